// A JSONL file: candidates for the present prompt, or many pairs and groups that are scored into a table.
import { byId, counted, decimal, element, letters, percent, signed } from "./dom.js";
import { call } from "./server.js";

const CHUNK = 25; // rows in one request, so that the table grows while it is scored
const LISTED = 20; // unreadable lines that are named

/**
 * @typedef {{line: number, kind: "candidate", text: string}} CandidateRow
 * @typedef {{line: number, kind: "pair", prompt: any, chosen: string, rejected: string}} PairRow
 * @typedef {{line: number, kind: "group", prompt: any, candidates: string[]}} GroupRow
 */

const isText = (value) => typeof value === "string";
const isPrompt = (value) => isText(value) || (Array.isArray(value) && value.every((one) => isText(one?.role) && isText(one?.content)));

/** @returns {CandidateRow|PairRow|GroupRow} @throws {Error} What is wrong with the row. */
function rowOf(value, line) {
  if (isText(value)) return { line, kind: "candidate", text: value };
  if (value === null || typeof value !== "object" || Array.isArray(value)) throw new Error("not an object or a string");
  const { prompt, chosen, rejected } = value;
  const candidates = value.candidates ?? value.responses;
  const text = value.response ?? value.text ?? value.completion;
  if (prompt === undefined && isText(text)) return { line, kind: "candidate", text };
  if (!isPrompt(prompt)) throw new Error("prompt is not a string or a list of messages");
  if (isText(chosen) && isText(rejected)) return { line, kind: "pair", prompt, chosen, rejected };
  if (Array.isArray(candidates) && candidates.length && candidates.every(isText)) return { line, kind: "group", prompt, candidates };
  if (isText(text)) return { line, kind: "group", prompt, candidates: [text] };
  throw new Error('no "chosen" and "rejected", "candidates" or "response" that are texts');
}

/**
 * Reads JSON lines. Rows with one response to the same prompt become one group.
 * @param {string} content
 * @returns {{rows: Array<CandidateRow|PairRow|GroupRow>, faults: Array<{line: number, reason: string}>}}
 */
export function readRows(content) {
  const rows = [];
  const faults = [];
  const groups = new Map();
  for (const [index, text] of content.split("\n").entries()) {
    if (!text.trim()) continue;
    try {
      const row = rowOf(JSON.parse(text), index + 1);
      const key = row.kind === "group" && row.candidates.length === 1 ? JSON.stringify(row.prompt) : null;
      if (key && groups.has(key)) groups.get(key).candidates.push(...row.candidates);
      else rows.push(row);
      if (key && !groups.has(key)) groups.set(key, row);
    } catch (error) {
      faults.push({ line: index + 1, reason: error instanceof SyntaxError ? "not valid JSON" : error.message });
    }
  }
  return { rows, faults };
}

/** @param {Array<{line: number, reason: string}>} faults @returns {HTMLElement|null} */
export function faultList(faults) {
  if (!faults.length) return null;
  const lines = faults.slice(0, LISTED).map((fault) => element("li", { textContent: `line ${fault.line}: ${fault.reason}` }));
  const rest = faults.length > LISTED ? element("li", { textContent: `and ${faults.length - LISTED} more` }) : null;
  return element("div", { className: "alarm", role: "alert" }, element("p", { textContent: `${counted(faults.length, "line")} cannot be used:` }), element("ul", {}, ...lines, rest));
}

/** Scores rows into a table; a newer file takes the place of an older one. */
export class FileTable {
  /** @param {(row: PairRow|GroupRow) => void} onOpen Called with the row that the reader wants in the editor. */
  constructor(onOpen) {
    this.onOpen = onOpen;
    this.controller = null;
  }

  /** Ends a run and clears the table. */
  clear() {
    this.controller?.abort();
    byId("table").replaceChildren();
  }

  /**
   * @param {string} name Of the file.
   * @param {Array<PairRow|GroupRow>} rows
   * @param {Array<{line: number, reason: string}>} faults
   * @param {{model: string, tie_below: number, truncation: string}} common
   */
  async score(name, rows, faults, common) {
    this.clear();
    const controller = (this.controller = new AbortController());
    const status = element("p", { className: "headline", role: "status" });
    const stop = element("button", { type: "button", textContent: "Stop" });
    const sort = element("button", { type: "button", textContent: "Sort by margin", hidden: true });
    const body = element("tbody");
    const head = element("tr", {}, ...["line", "prompt", "result", "margin", "confidence", ""].map((title) => element("th", { scope: "col", textContent: title })));
    const table = element("div", { className: "scroll", tabIndex: 0, role: "group", "aria-label": "Scored rows" }, element("table", {}, element("thead", {}, head), body));
    byId("table").replaceChildren(element("h2", { textContent: name }), status, element("div", { className: "row" }, stop, sort), ...[faultList(faults)].filter(Boolean), table);
    stop.addEventListener("click", () => controller.abort());
    sort.addEventListener("click", () => this.#sort(sort, body));
    const tally = { right: 0, pairs: 0, refused: 0, done: 0 };
    try {
      for (const kind of ["pair", "group"]) {
        const some = rows.filter((row) => row.kind === kind);
        for (let start = 0; start < some.length; start += CHUNK) {
          const chunk = some.slice(start, start + CHUNK);
          const outcomes = await ask(kind, chunk, common, controller.signal);
          body.append(...chunk.map((row, index) => this.#line(row, outcomes[index], tally)));
          tally.done += chunk.length;
          status.textContent = this.#summary(tally, rows.length);
        }
      }
    } catch (error) {
      const left = `${tally.done} of ${rows.length} rows were scored.`;
      status.textContent = error.name === "AbortError" ? `Stopped: ${left}` : `${error.message} ${left}`;
    }
    stop.hidden = true;
    sort.hidden = tally.done < 2;
  }

  #summary({ right, pairs, refused, done }, all) {
    const agreed = pairs ? ` ${right} of ${counted(pairs, "pair")} ranked as labelled (${percent(right / pairs)}).` : "";
    return `${done} of ${counted(all, "row")} scored.${agreed}${refused ? ` ${refused} refused.` : ""}`;
  }

  #line(row, outcome, tally) {
    const prompt = isText(row.prompt) ? row.prompt : row.prompt.map((message) => message.content).join(" ");
    const cells = [["number", String(row.line)], ["", prompt.slice(0, 80)]];
    let margin = -Infinity;
    if (outcome.error) {
      tally.refused += 1;
      cells.push(["alarm", outcome.error.message], ["number", ""], ["number", ""]);
    } else {
      margin = outcome.margin ?? Infinity;
      if (row.kind === "pair") {
        tally.pairs += 1;
        tally.right += outcome.margin > 0 ? 1 : outcome.margin === 0 ? 0.5 : 0;
      }
      const verdict = row.kind === "pair" ? outcome.verdict : `${letters(outcome.best)} is best of ${row.candidates.length}${outcome.tie ? ", a tie" : ""}`;
      const sure = outcome.confidence === null ? "" : percent(outcome.confidence);
      cells.push(["", verdict], ["number", outcome.margin === null ? decimal(outcome.ranking[0].reward) : signed(outcome.margin)], ["number", sure]);
    }
    const open = element("button", { type: "button", textContent: "Open", "aria-label": `Open line ${row.line}` });
    open.addEventListener("click", () => this.onOpen(row));
    const line = element("tr", {}, ...cells.map(([className, textContent]) => element("td", { className, textContent, dir: "auto" })), element("td", {}, open));
    line.dataset.line = row.line;
    line.dataset.margin = margin;
    return line;
  }

  #sort(button, body) {
    const byMargin = button.textContent.endsWith("margin");
    const key = byMargin ? "margin" : "line";
    body.append(...[...body.children].sort((a, b) => Number(a.dataset[key]) - Number(b.dataset[key])));
    button.textContent = byMargin ? "Sort by line" : "Sort by margin";
  }
}

async function ask(kind, rows, common, signal) {
  if (kind === "pair") {
    const pairs = rows.map(({ prompt, chosen, rejected }) => ({ prompt, chosen, rejected }));
    return outcomesOf(call("/score", { body: { ...common, pairs }, signal }), "pairs", rows);
  }
  const prompts = rows.map(({ prompt, candidates }) => ({ prompt, candidates }));
  return outcomesOf(call("/best-of-n", { body: { ...common, prompts }, signal }), "prompts", rows);
}

/** A request whose only row is refused fails as a whole; here that is the row's outcome. */
async function outcomesOf(reply, name, rows) {
  try {
    return (await reply)[name];
  } catch (error) {
    if (rows.length === 1 && error.status === 422) return [{ error }];
    throw error;
  }
}
