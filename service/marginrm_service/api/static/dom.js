// Small helpers of every page: elements, and numbers as people read them.

/** @param {string} id @returns {HTMLElement} */
export const byId = (id) => document.getElementById(id);

/**
 * Makes an element. Texts become text nodes, never markup.
 * @param {string} tag
 * @param {Object<string, unknown>} [properties] Properties; a name with a dash is set as an attribute.
 * @param {...(Node|string|null|undefined)} children
 */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** @param {string} text @returns {Array<Node|string>} Its parts; what stands in backticks as code. */
export const prose = (text) => text.split(/`([^`]+)`/).map((part, place) => (place % 2 ? element("code", { textContent: part }) : part));

/** @param {number} share @returns {string} A share in percent; near the ends with a decimal, and never rounded onto one. */
export function percent(share) {
  if (share > 0.999 && share < 1) return ">99.9%";
  if (share < 0.001 && share > 0) return "<0.1%";
  return `${(100 * share).toFixed(share > 0.99 || share < 0.01 ? 1 : 0)}%`;
}

/** @param {number} value @param {number} [digits] @returns {string} With a sign and a real minus. */
export const signed = (value, digits = 3) => `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toFixed(digits)}`;

/** @param {number} value @param {number} [digits] @returns {string} With a real minus. */
export const decimal = (value, digits = 3) => value.toFixed(digits).replace("-", "\u2212");

/** @param {number} value @returns {string} Short: whole numbers whole, others with four significant digits. */
export const short = (value) =>
  Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4))).replace("-", "\u2212");

/** @param {number} count @param {string} noun @returns {string} */
export const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** @param {number} margin @param {number} temperature @returns {number} P(first is better), without overflow. */
export function confidenceOf(margin, temperature) {
  return 1 / (1 + Math.exp(-margin / temperature));
}

/** @param {number} place From 0. @returns {string} A, B, ... Z, AA, AB, ... */
export function letters(place) {
  let text = "";
  for (let rest = place + 1; rest > 0; rest = Math.floor((rest - 1) / 26)) {
    text = String.fromCharCode(65 + ((rest - 1) % 26)) + text;
  }
  return text;
}

/**
 * A table of two columns.
 * @param {Array<[string, Node|string]>} rows
 */
export function facts(rows) {
  const lines = rows.map(([name, value]) =>
    element("tr", {}, element("th", { scope: "row", textContent: name }), element("td", {}, value)),
  );
  return element("table", {}, element("tbody", {}, ...lines));
}
