// The page at "/": asks the server what every client may ask, and shows what comes back, also what it refuses.
import { byId, counted, element } from "./dom.js";
import { asCurl, asJson, asPython, showCopy } from "./copies.js";
import { Editor } from "./editor.js";
import { EXAMPLES } from "./examples.js";
import { FileTable, faultList, readRows } from "./files.js";
import { ServerError, addThemeButton, call } from "./server.js";
import { Side } from "./side.js";
import { bodyOf, fromFragment, toFragment } from "./state.js";

const PAUSE = 250; // milliseconds without a keystroke before a request is sent
const LOADING = 1000; // milliseconds between questions to a server that is loading

const editor = new Editor(changed);
const table = new FileTable(openRow);
let models = [];
let sides = [];
let choice = 0; // of models; an older one is dropped
let sequence = 0; // of requests; an answer to an older one is dropped
let running = null;
let timer = 0;

function changed() {
  clearTimeout(timer);
  byId("lesson").hidden = true;
  if (!byId("live").checked) return;
  byId("results").setAttribute("aria-busy", "true");
  timer = setTimeout(score, PAUSE);
}

/** Marks the results as those of an older question, or as those of the present one. */
function setBusy(busy) {
  byId("results").setAttribute("aria-busy", String(busy));
  byId("sides").classList.toggle("busy", busy);
}

function say(id, text) {
  byId(id).textContent = text;
  byId(id).hidden = !text;
}

/** Scores what the editor holds; what is under way is given up. */
async function score() {
  clearTimeout(timer);
  const mine = ++sequence;
  running?.abort();
  running = new AbortController();
  const state = editor.read();
  if (!sides.length) {
    await loadModels(); // no model was there, or the key was not given
    return;
  }
  if (!state.candidates.length) {
    say("problem", "There is no candidate to score: write one.");
    setBusy(false);
    return;
  }
  setBusy(true);
  try {
    const { signal } = running;
    const replies = await Promise.all(sides.map((side) => outcomeOf(state, side.model, signal)));
    if (mine !== sequence) return;
    say("problem", "");
    await adopt(replies);
    if (mine !== sequence) return;
    editor.mark(refusals(state, replies));
    await Promise.all(sides.map((side, place) => side.show(state, replies[place].outcome, replies[place].usage)));
  } catch (error) {
    if (mine === sequence && error.name !== "AbortError") await failed(error);
  } finally {
    if (mine === sequence) setBusy(false);
  }
}

/** Asks one model. A prompt that is refused as a whole is an outcome too: every candidate shows why. */
async function outcomeOf(state, model, signal) {
  try {
    const reply = await call("/best-of-n", { body: bodyOf(state, model), signal });
    return { outcome: reply.prompts[0], usage: reply.usage, model: reply.model };
  } catch (error) {
    if (error.status !== 422 || error.code === "invalid_request") throw error;
    return { outcome: { error }, usage: { tokens: 0, tokens_computed: 0 }, model: null };
  }
}

function refusals(state, replies) {
  const found = new Map();
  for (const { outcome } of replies) {
    const errors = outcome.error ? state.candidates.map((_, candidate) => ({ candidate, error: outcome.error })) : (outcome.errors ?? []);
    for (const { candidate, error } of errors) found.set(state.places[candidate], `Refused: ${error.message}`);
  }
  return found;
}

/** Loads a model's description anew where an answer came from another revision than the one described. */
async function adopt(replies) {
  for (const [place, side] of sides.entries()) {
    const revision = replies[place].model?.revision;
    if (!revision || revision === side.detail?.revision) continue;
    const before = side.detail?.revision;
    await side.load();
    if (before) say("notice", `Model ${side.model} was swapped: ${before} is now ${side.detail.revision}. All that is shown comes from the new one.`);
    showFacts();
  }
}

async function failed(error) {
  if (error.code === "unknown_model") {
    say("notice", `${error.message} The choice was renewed.`);
    await loadModels();
    return;
  }
  if (!error.passing) {
    say("problem", error.message);
    return;
  }
  say("problem", `${error.message} Trying again in ${counted(error.retryAfter, "second")}.`);
  const mine = sequence;
  setTimeout(() => mine === sequence && score(), 1000 * error.retryAfter);
}

function showFacts() {
  const detail = sides[0]?.detail;
  if (!detail) return;
  const calibrated = detail.calibrated ? `T = ${detail.temperature.toFixed(2)}` : "not calibrated: its confidences are rough";
  const base = detail.base_model.split("/").at(-1); // of a local folder, only its name
  byId("facts").textContent = `${base} · ${detail.dtype} · ${calibrated} · up to ${counted(detail.max_length, "token")}`;
  byId("facts").title = `${detail.revision}; ${detail.forward_reason}`;
  byId("model-page").href = `/models/${encodeURIComponent(detail.id)}`;
}

/** Asks which models there are until the server has loaded one, and scores. */
async function loadModels(wanted = {}) {
  try {
    models = (await call("/v1/models")).data;
    if (!models.length) {
      await call("/readyz"); // says why there is none
      throw new ServerError("The server has no model yet.");
    }
  } catch (error) {
    say("facts", error.message);
    if (error.passing) setTimeout(() => loadModels(wanted), LOADING);
    return;
  }
  const names = models.map((model) => model.id);
  const fill = (id, options, value) => {
    const chosen = value ?? byId(id).value;
    byId(id).replaceChildren(...options);
    if (names.includes(chosen)) byId(id).value = chosen;
  };
  fill("model", names.map((name) => new Option(name, name)), wanted.model);
  fill("second", [new Option("no other", ""), ...names.map((name) => new Option(name, name))], wanted.second);
  byId("choices").hidden = names.length < 2;
  await chooseSides();
}

/** Shows the chosen models; a choice that was changed meanwhile is dropped. */
async function chooseSides() {
  const mine = ++choice;
  const [first, second] = [byId("model").value, byId("second").value];
  const chosen = second && second !== first ? [first, second] : [first];
  const made = chosen.map((name) => new Side(name, chosen.length > 1));
  try {
    await Promise.all(made.map((side) => side.load()));
  } catch (error) {
    say("problem", error.message);
    if (error.passing) setTimeout(() => mine === choice && chooseSides(), 1000 * error.retryAfter);
    return;
  }
  if (mine !== choice) return;
  sides = made;
  byId("sides").replaceChildren(...sides.map((side) => side.node));
  showFacts();
  await score();
}

function openRow(row) {
  const candidates = row.kind === "pair" ? [row.chosen, row.rejected] : row.candidates;
  editor.write({ ...editor.read(), prompt: row.prompt, candidates });
  byId("results").scrollIntoView();
  score();
}

/** @param {File} file */
async function openFile(file) {
  const { rows, faults } = readRows(await file.text());
  table.clear();
  const state = editor.read();
  if (rows.length && rows.every((row) => row.kind === "candidate")) {
    editor.write({ ...state, candidates: rows.map((row) => row.text) });
    byId("table").replaceChildren(...[faultList(faults)].filter(Boolean));
    await score();
    return;
  }
  const scored = rows.filter((row) => row.kind !== "candidate");
  faults.push(...rows.filter((row) => row.kind === "candidate").map((row) => ({ line: row.line, reason: "a response without a prompt, among rows with one" })));
  if (scored.length === 1) {
    byId("table").replaceChildren(...[faultList(faults)].filter(Boolean));
    openRow(scored[0]);
    return;
  }
  const { tie_below, truncation } = state;
  await table.score(file.name, scored, faults, { model: sides[0]?.model ?? "default", tie_below, truncation });
}

/** Takes the state of a link over, if the address has one. @returns {Promise<object|null>} */
async function restored() {
  if (location.hash.length < 2) return null;
  try {
    return await fromFragment(location.hash.slice(1));
  } catch (error) {
    say("notice", `The link's state cannot be read (${error.message}); an example is shown instead.`);
    return null;
  }
}

function present() {
  const { places, ...state } = editor.read();
  return { ...state, model: byId("model").value, second: byId("second").value };
}

function bindFiles() {
  byId("open").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (file) await openFile(file);
  });
  const target = byId("editor");
  for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      target.classList.toggle("dropping", name === "dragenter" || name === "dragover");
      if (name === "drop" && event.dataTransfer.files.length) openFile(event.dataTransfer.files[0]);
    });
  }
}

function bind() {
  byId("editor").addEventListener("submit", (event) => {
    event.preventDefault();
    score();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) score();
  });
  for (const id of ["model", "second"]) byId(id).addEventListener("change", chooseSides);
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => {
      const form = { curl: asCurl, python: asPython, json: asJson }[button.dataset.copy];
      showCopy(button.textContent, form(present(), byId("model").value || "default"));
    });
  }
  byId("link").addEventListener("click", async () => {
    history.replaceState(null, "", `#${await toFragment(present())}`);
    await showCopy("Copy a link", location.href);
  });
  window.addEventListener("hashchange", async () => {
    const state = await restored();
    if (state) editor.write(state);
    await loadModels(state ?? {});
  });
  const buttons = EXAMPLES.map((example) => {
    const button = element("button", { type: "button", textContent: example.name });
    button.addEventListener("click", () => {
      editor.write({ tie_below: 0.55, truncation: "error", ...example.state() });
      table.clear();
      say("lesson", example.lesson);
      score();
    });
    return button;
  });
  byId("examples").append(...buttons);
  bindFiles();
}

async function start() {
  addThemeButton();
  bind();
  const state = await restored();
  editor.write(state ?? { tie_below: 0.55, truncation: "error", ...EXAMPLES[0].state() });
  await loadModels(state ?? {});
}

start();
