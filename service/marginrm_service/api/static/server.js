// Requests to this server: one way for all pages, with the key that the reader entered.
import { byId, element } from "./dom.js";

const KEY = "marginrm-key"; // in the tab's session storage: gone when the tab is closed

/** A refusal, or a server that cannot be reached (status 0). */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, code?: string, param?: string, retryAfter?: number}} [facts]
   */
  constructor(message, { status = 0, code = "unreachable", param = "", retryAfter = 2 } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
    this.retryAfter = retryAfter;
  }

  /** @returns {boolean} Whether the same request may succeed later: the server is restarting, loading or busy. */
  get passing() {
    return this.status === 0 || this.status === 429 || this.status === 503;
  }
}

/** @returns {boolean} Whether requests carry a key. */
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

let asking = null;

/**
 * Asks the reader for the server's key; one question at a time.
 * @param {boolean} refused Whether a key was sent and not accepted.
 * @returns {Promise<boolean>} Whether a key was entered.
 */
function askForKey(refused) {
  asking ??= new Promise((resolve) => {
    const input = element("input", { id: "key", type: "password", autocomplete: "off", required: true });
    const cancel = element("button", { type: "button", textContent: "Cancel" });
    const message = refused ? "The server does not accept this key." : "This server wants an API key.";
    const form = element(
      "form",
      { method: "dialog" },
      element("h2", { id: "key-title", textContent: "API key" }),
      element("p", { className: refused ? "alarm" : "", textContent: message, role: "alert" }),
      element("label", { htmlFor: "key", textContent: "Key" }),
      element("div", { className: "row" }, input, element("button", { className: "primary", textContent: "Use this key" }), cancel),
      element("p", { className: "note", textContent: "It is kept in this tab only, and sent to this server only." }),
    );
    const dialog = element("dialog", { "aria-labelledby": "key-title" }, form);
    cancel.addEventListener("click", () => dialog.close());
    form.addEventListener("submit", () => sessionStorage.setItem(KEY, input.value.trim()));
    dialog.addEventListener("close", () => {
      dialog.remove();
      asking = null;
      resolve(Boolean(input.value.trim()) && hasKey());
    });
    document.body.append(dialog);
    dialog.showModal();
  });
  return asking;
}

/**
 * Sends a request and returns its JSON, or its text.
 * @param {string} path
 * @param {{body?: unknown, signal?: AbortSignal, as?: "json"|"text"|"blob"}} [options]
 * @returns {Promise<any>}
 * @throws {ServerError} A refusal, or the server cannot be reached. An AbortError passes through.
 */
export async function call(path, { body, signal, as = "json" } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const request = { method: body === undefined ? "GET" : "POST", headers, signal };
  if (body !== undefined) request.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (response.ok) return response[as]();
  if (response.status === 401) {
    const newer = sessionStorage.getItem(KEY) !== key; // another request asked meanwhile
    if (newer || (await askForKey(key !== null))) return call(path, { body, signal, as });
  }
  const { error = {} } = await response.json().catch(() => ({}));
  throw new ServerError(error.message || `The server answered ${response.status}.`, {
    status: response.status,
    code: error.code,
    param: error.param,
    retryAfter: Number(response.headers.get("Retry-After")) || 2,
  });
}

/**
 * Sends a body as it is written and returns what comes back as it is, also a refusal.
 * @param {string} path
 * @param {string} method
 * @param {string} body
 * @returns {Promise<{status: number|string, text: string}>}
 */
export async function send(path, method, body) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  try {
    const response = await fetch(path, { method, headers, body });
    const text = await response.text();
    const isJson = response.headers.get("Content-Type")?.includes("json");
    return { status: response.status, text: isJson ? JSON.stringify(JSON.parse(text), null, 2) : text };
  } catch {
    return { status: "The server cannot be reached.", text: "" };
  }
}

/** Lets the reader choose between the light and the dark look; without a choice the system's holds. */
export function addThemeButton() {
  const button = byId("theme");
  const dark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const show = () => {
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Use the ${dark() ? "light" : "dark"} look`);
  };
  const stored = localStorage.getItem("marginrm-theme");
  if (stored) document.documentElement.dataset.theme = stored;
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    localStorage.setItem("marginrm-theme", document.documentElement.dataset.theme);
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
}

/**
 * Fetches a figure of a model as an element of this page.
 * @param {string} model
 * @param {string} name As the model's `figures` lists them.
 * @returns {Promise<SVGElement>}
 */
export async function figure(model, name) {
  const text = await call(`/v1/models/${encodeURIComponent(model)}/figures/${encodeURIComponent(name)}`, { as: "text" });
  return document.importNode(new DOMParser().parseFromString(text, "image/svg+xml").documentElement, true);
}
