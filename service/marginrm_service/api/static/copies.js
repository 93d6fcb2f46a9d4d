// The present question as a command, as Python or as JSON, in a dialog with the text and a button that copies it.
import { element } from "./dom.js";
import { hasKey } from "./server.js";
import { bodyOf } from "./state.js";

const KEY_VARIABLE = "MARGINRM_API_KEY"; // the key itself is never written into a text that is to be passed on

/** @param {string} text @returns {string} For a POSIX shell. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** @param {import("./state.js").State} state @param {string} model @returns {string} */
export function asCurl(state, model) {
  const key = hasKey() ? ` \\\n  -H "Authorization: Bearer $${KEY_VARIABLE}"` : "";
  return `curl -sS ${location.origin}/best-of-n${key} \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(bodyOf(state, model)))}\n`;
}

/** JSON's strings, lists and numbers are Python's too. @returns {string} */
export function asPython(state, model) {
  const literal = (value) => JSON.stringify(value, null, 4).replaceAll("\u007f", "\\u007f");
  const key = hasKey() ? `, api_key=os.environ["${KEY_VARIABLE}"]` : "";
  const cut = state.truncation === "error" ? "" : `, truncation="${state.truncation}"`;
  return `${hasKey() ? "import os\n\n" : ""}from marginrm.client import RewardClient

prompt = ${literal(state.prompt)}
candidates = ${literal(state.candidates)}

with RewardClient("${location.origin}", model=${literal(model)}${key}${cut}) as client:
    ranking = client.best_of_n(prompt, candidates, tie_below=${state.tie_below})
for place in ranking.ranking:
    print(place.rank, round(place.reward, 3), round(place.p_best, 3), candidates[place.candidate][:60])
`;
}

/** @returns {string} The body of `POST /best-of-n`. */
export const asJson = (state, model) => `${JSON.stringify(bodyOf(state, model), null, 2)}\n`;

/**
 * Copies a text, and shows it, since a page that does not come from this machine may not reach the clipboard.
 * @param {string} title
 * @param {string} text
 */
export async function showCopy(title, text) {
  const status = element("p", { className: "note", role: "status" });
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      status.textContent = "Copied.";
    } catch {
      status.textContent = "The browser keeps its clipboard from this page: select the text and copy it.";
    }
  };
  const again = element("button", { type: "button", className: "primary", textContent: "Copy" });
  const close = element("button", { type: "button", textContent: "Close" });
  const area = element("textarea", { readOnly: true, rows: 14, cols: 70, value: text, spellcheck: false, "aria-label": title });
  const dialog = element(
    "dialog",
    { "aria-label": title },
    element("h2", { textContent: title }),
    area,
    element("div", { className: "row" }, again, close),
    status,
  );
  again.addEventListener("click", copy);
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  await copy();
}
