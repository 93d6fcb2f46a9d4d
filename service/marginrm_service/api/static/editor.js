// The left half of the playground: the prompt as a text or as messages with roles, and the candidates as cards.
import { byId, element, letters } from "./dom.js";

/** @typedef {import("./state.js").State} State */

const ROLES = ["system", "user", "assistant"];

/** The form; `onChange` is called when something that is scored has changed. */
export class Editor {
  /** @param {() => void} onChange */
  constructor(onChange) {
    this.onChange = onChange;
    this.prompt = "";
    byId("as-text").addEventListener("click", () => this.#showAs(false));
    byId("as-chat").addEventListener("click", () => this.#showAs(true));
    byId("add").addEventListener("click", () => this.#add());
    for (const id of ["tie", "cut"]) byId(id).addEventListener("change", onChange);
  }

  /** @returns {State} What the form holds; candidates that are empty are left out, and `places` says which are not. */
  read() {
    const texts = this.#texts();
    const places = texts.flatMap((text, place) => (text.trim() ? [place] : []));
    return {
      prompt: this.#readPrompt(),
      candidates: places.map((place) => texts[place]),
      tie_below: Math.min(0.99, Math.max(0.5, Number(byId("tie").value) || 0.5)),
      truncation: byId("cut").checked ? "prompt_left" : "error",
      places,
    };
  }

  /** @param {State} state */
  write(state) {
    this.#writePrompt(state.prompt);
    byId("cards").replaceChildren(...state.candidates.map((text, place) => this.#card(text, place)));
    byId("tie").value = state.tie_below;
    byId("cut").checked = state.truncation === "prompt_left";
  }

  /**
   * Shows under the cards what became of them.
   * @param {Map<number, string>} states By the card's place; cards without one show nothing.
   */
  mark(states) {
    for (const [place, card] of [...byId("cards").children].entries()) {
      const line = card.querySelector(".state");
      line.textContent = states.get(place) ?? "";
      line.hidden = !states.has(place);
    }
  }

  #texts() {
    return [...byId("cards").querySelectorAll("textarea")].map((area) => area.value);
  }

  #card(text, place) {
    const id = `candidate-${place}`;
    const area = element("textarea", { id, rows: Math.min(8, 2 + Math.floor(text.length / 90)), value: text, dir: "auto", spellcheck: false });
    area.addEventListener("input", this.onChange);
    const remove = element("button", { type: "button", textContent: "Remove", "aria-label": `Remove candidate ${letters(place)}` });
    remove.addEventListener("click", () => this.#remove(place));
    return element(
      "div",
      { className: "card box" },
      element("div", { className: "row" }, element("label", { htmlFor: id, textContent: `Candidate ${letters(place)}` }), remove),
      area,
      element("p", { className: "state alarm", hidden: true }),
    );
  }

  #add() {
    const cards = byId("cards");
    cards.append(this.#card("", cards.children.length));
    cards.lastElementChild.querySelector("textarea").focus();
  }

  #remove(place) {
    const texts = this.#texts().filter((_, other) => other !== place);
    byId("cards").replaceChildren(...texts.map((text, index) => this.#card(text, index)));
    (byId(`candidate-${Math.min(place, texts.length - 1)}`) ?? byId("add")).focus();
    this.onChange();
  }

  #readPrompt() {
    const text = byId("prompt");
    if (text) return text.value;
    return [...byId("prompt-area").querySelectorAll(".message")].map((row) => ({
      role: row.querySelector("select").value,
      content: row.querySelector("textarea").value,
    }));
  }

  #showAs(chat) {
    const prompt = this.#readPrompt();
    if (Array.isArray(prompt) === chat) return;
    const joined = chat ? "" : prompt.map((message) => message.content).join("\n\n");
    this.#writePrompt(chat ? [{ role: "user", content: prompt }] : joined);
    this.onChange();
  }

  #writePrompt(prompt) {
    const chat = Array.isArray(prompt);
    byId("as-text").setAttribute("aria-pressed", String(!chat));
    byId("as-chat").setAttribute("aria-pressed", String(chat));
    if (!chat) {
      const area = element("textarea", { id: "prompt", rows: 3, value: prompt, dir: "auto", spellcheck: false, "aria-label": "Prompt" });
      area.addEventListener("input", this.onChange);
      byId("prompt-area").replaceChildren(area);
      return;
    }
    const add = element("button", { type: "button", textContent: "Add a message" });
    add.addEventListener("click", () => {
      const messages = this.#readPrompt();
      const role = messages.at(-1)?.role === "user" ? "assistant" : "user";
      this.#writePrompt([...messages, { role, content: "" }]);
      [...byId("prompt-area").querySelectorAll("textarea")].at(-1).focus();
    });
    byId("prompt-area").replaceChildren(...prompt.map((message, place) => this.#message(message, place)), element("div", { className: "row" }, add));
  }

  #message(message, place) {
    const roles = ROLES.includes(message.role) ? ROLES : [...ROLES, message.role];
    const role = element("select", { "aria-label": `Role of message ${place + 1}` }, ...roles.map((name) => new Option(name, name)));
    role.value = message.role;
    role.addEventListener("change", this.onChange);
    const area = element("textarea", { rows: 2, value: message.content, dir: "auto", spellcheck: false, "aria-label": `Message ${place + 1}` });
    area.addEventListener("input", this.onChange);
    const remove = element("button", { type: "button", textContent: "Remove", "aria-label": `Remove message ${place + 1}` });
    remove.addEventListener("click", () => {
      this.#writePrompt(this.#readPrompt().filter((_, other) => other !== place));
      this.onChange();
    });
    return element("div", { className: "message box" }, element("div", { className: "row" }, role, remove), area);
  }
}
