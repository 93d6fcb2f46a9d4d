// What the playground asks, and the same as a link: the state lies in the address's fragment, which browsers never send.

/**
 * @typedef {{role: string, content: string}} Message
 * @typedef {object} State
 * @property {string|Message[]} prompt
 * @property {string[]} candidates
 * @property {number} tie_below
 * @property {"error"|"prompt_left"} truncation
 * @property {string} [model]
 * @property {string} [second]
 */

/** @param {State} state @param {string} model @returns {object} The body of `POST /best-of-n`. */
export function bodyOf(state, model) {
  return {
    model,
    truncation: state.truncation,
    tie_below: state.tie_below,
    prompts: [{ prompt: state.prompt, candidates: state.candidates }],
  };
}

/** @param {State} state @returns {Promise<string>} JSON, deflated, in URL-safe base64. */
export async function toFragment(state) {
  const packed = new Blob([JSON.stringify(state)]).stream().pipeThrough(new CompressionStream("deflate-raw"));
  const bytes = new Uint8Array(await new Response(packed).arrayBuffer());
  let binary = "";
  for (let start = 0; start < bytes.length; start += 32_768) {
    binary += String.fromCharCode(...bytes.subarray(start, start + 32_768));
  }
  return btoa(binary).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/**
 * @param {string} fragment As `toFragment` makes it.
 * @returns {Promise<State>}
 * @throws {Error} It is not a state.
 */
export async function fromFragment(fragment) {
  const binary = atob(fragment.replaceAll("-", "+").replaceAll("_", "/"));
  const bytes = Uint8Array.from(binary, (letter) => letter.charCodeAt(0));
  const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"))).text();
  return checked(JSON.parse(text));
}

/** @param {any} state @returns {State} */
function checked(state) {
  const isText = (value) => typeof value === "string";
  const isMessage = (one) => isText(one?.role) && isText(one?.content);
  const promptFits = isText(state.prompt) || (Array.isArray(state.prompt) && state.prompt.every(isMessage));
  if (!promptFits || !Array.isArray(state.candidates) || !state.candidates.every(isText)) {
    throw new Error("the link holds no prompt with candidates");
  }
  return {
    prompt: state.prompt,
    candidates: state.candidates,
    tie_below: state.tie_below >= 0.5 && state.tie_below < 1 ? state.tie_below : 0.55,
    truncation: state.truncation === "prompt_left" ? "prompt_left" : "error",
    model: isText(state.model) ? state.model : undefined,
    second: isText(state.second) ? state.second : undefined,
  };
}
