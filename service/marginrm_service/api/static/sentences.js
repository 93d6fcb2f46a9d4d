// Leave one sentence out: how the reward falls without each sentence of a response.
import { element, signed } from "./dom.js";
import { call } from "./server.js";
import { bodyOf } from "./state.js";

const MOST = 64; // sentences of one response: each is scored once without

/** @param {string} text @returns {string[]} Its sentences; joined they are the text. */
export function sentencesOf(text) {
  if (!Intl.Segmenter) return text.match(/[^.!?\n]*[.!?\n]+\s*|[^.!?\n]+$/g) ?? [text];
  const pieces = [...new Intl.Segmenter(undefined, { granularity: "sentence" }).segment(text)].map((one) => one.segment);
  return pieces.reduce((found, piece) => {
    if (piece.trim() || !found.length) found.push(piece);
    else found[found.length - 1] += piece; // white space alone belongs to the sentence before it
    return found;
  }, []);
}

/**
 * Scores a response without each of its sentences, and shows the differences.
 * @param {import("./state.js").State} state
 * @param {string} text
 * @param {string} model
 * @returns {Promise<HTMLElement>}
 */
export async function sentenceEffects(state, text, model) {
  const sentences = sentencesOf(text);
  if (sentences.length < 2) return element("p", { className: "note", textContent: "It is a single sentence: there is nothing to leave out." });
  if (sentences.length > MOST) return element("p", { className: "note", textContent: `It has ${sentences.length} sentences; at most ${MOST} are taken.` });
  const without = sentences.map((_, left) => sentences.filter((_, place) => place !== left).join(""));
  const reply = await call("/best-of-n", { body: bodyOf({ ...state, candidates: [text, ...without] }, model) });
  const rewards = new Map(reply.prompts[0].ranking.map((entry) => [entry.candidate, entry.reward]));
  const lines = sentences.map((sentence, place) => {
    const delta = rewards.has(place + 1) && rewards.has(0) ? rewards.get(0) - rewards.get(place + 1) : null;
    return element(
      "li",
      { className: delta === null ? "" : delta >= 0 ? "up" : "down" },
      element("span", { className: "number", textContent: delta === null ? "refused" : signed(delta) }),
      element("span", { className: "words", dir: "auto", textContent: sentence.trim() }),
    );
  });
  return element(
    "div",
    {},
    element("p", { className: "note", textContent: "What each sentence adds: the reward with it minus the reward without it. The figures need not sum to the reward." }),
    element("ol", { className: "sentences" }, ...lines),
  );
}
