// The page at "/models/{name}": the JSON of "/v1/models/{name}" as a person reads it.
import { byId, counted, element, facts, percent, short } from "./dom.js";
import { addThemeButton, call, figure, hasKey } from "./server.js";

const MEANING = {
  strength: "Pairs whose label says how much better the chosen response is: strong preferences should be ranked right more often.",
  margins: "Density between the quantiles that the checkpoint keeps. Right of 0 the model agrees with the label.",
  reliability: "On the diagonal a confidence is what it says. Lines are 95% intervals of each bin's share.",
  "risk-coverage": "The share ranked wrong if only the surest pairs are decided.",
  "best-of-n": "Quality of the model's pick among N candidates, judged independently; the band is a 95% interval over prompts.",
  drift: "Shares of margins between the calibration's quantiles. Where the bars differ, texts are unlike those of the calibration.",
};

/** @param {string} name @returns {string} */
const words = (name) => name.replaceAll("_", " ");

/** Returns any JSON value as an element or text. */
function shown(value) {
  if (value === null || value === undefined || value === "") return "none";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") return short(value);
  if (Array.isArray(value)) return value.every((one) => typeof one !== "object") ? value.map(shown).join(", ") : table(value);
  if (typeof value === "object") return facts(Object.entries(value).map(([name, one]) => [words(name), shown(one)]));
  return String(value);
}

/** @param {object[]} rows Objects with the same names. */
function table(rows) {
  const names = Object.keys(rows[0] ?? {});
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col", textContent: words(name) })));
  const lines = rows.map((row) => element("tr", {}, ...names.map((name) => element("td", {}, shown(row[name])))));
  return element("div", { className: "scroll", tabIndex: 0, role: "group", "aria-label": "Table" },
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...lines)));
}

function section(title, note, ...children) {
  const id = title.toLowerCase().replace(/\W+/g, "-");
  return element(
    "section",
    { "aria-labelledby": id },
    element("h2", { id, textContent: title }),
    note ? element("p", { className: "note", textContent: note }) : null,
    ...children,
  );
}

/** @param {Object<string, number>} metrics @returns {Array<[string, string]>} Each with its interval beside it. */
function measures(metrics) {
  return Object.entries(metrics)
    .filter(([name]) => !/_(low|high)$/.test(name) || !(name.replace(/_(low|high)$/, "") in metrics))
    .map(([name, value]) => {
      const [low, high] = [metrics[`${name}_low`], metrics[`${name}_high`]];
      return [words(name), low === undefined ? short(value) : `${short(value)} [${short(low)}, ${short(high)}]`];
    });
}

function calibration(model) {
  const found = model.calibration;
  if (!found) {
    const note = "No temperature was fitted: T = 1, and confidences are rough. `marginrm calibrate` fits one on preference pairs.";
    return section("Calibration", note);
  }
  const interval = found.temperature_interval;
  const text = `T = ${short(found.temperature)}${interval ? `, 95% interval ${short(interval[0])} to ${short(interval[1])}` : ""}, from ${counted(found.n, "pair")}.`;
  const row = (name, before, after) => ({ measure: name, "before (T = 1)": before, after });
  return section(
    "Calibration",
    `${text} Confidence is 1 / (1 + exp(\u2212margin / T)).${found.note ? ` ${found.note}` : ""}`,
    table([
      row("expected calibration error", found.ece_before, found.ece_after),
      row("Brier score", found.brier_before, found.brier_after),
      row("negative log likelihood, nats", found.nll_before, found.nll_after),
    ]),
  );
}

function golden(model) {
  const test = model.golden;
  if (!test) return section("Self-test", "The checkpoint has no golden samples to reproduce.");
  const allowed = test.tolerance === null ? "" : `; ${short(test.tolerance)} is allowed in ${model.dtype}`;
  return section(
    "Self-test",
    `Passed when it was loaded: ${counted(test.samples, "golden reward")} reproduced within ${test.difference.toExponential(1)}${allowed}.`,
  );
}

function drift(model) {
  const state = model.drift;
  if (!state) return section("Live drift", "The checkpoint has no margin quantiles to compare with.");
  if (state.psi === null) {
    return section("Live drift", `${counted(state.margins, "margin")} served since it was loaded; the index is given from ${state.needed} on.`);
  }
  const verdict = state.psi < 0.1 ? "stable" : state.psi > 0.25 ? "a shift" : "a moderate change";
  return section(
    "Live drift",
    `Population stability index ${short(state.psi)} nats over the last ${counted(state.margins, "margin")}: ${verdict} (below 0.1 stable, above 0.25 a shift).`,
  );
}

function documentLinks(model) {
  if (!model.documents.length) return null;
  const names = { "report.html": "Report of the training run", "README.md": "Model card" };
  const links = model.documents.map((document_) => {
    const path = `/v1/models/${encodeURIComponent(model.id)}/documents/${document_}`;
    const link = element("a", { href: path, textContent: names[document_] ?? document_ });
    if (hasKey()) link.addEventListener("click", (event) => download(event, path, document_));
    return element("li", {}, link);
  });
  return section("Documents", "", element("ul", {}, ...links));
}

/** A link cannot carry a key: the file is fetched with it and handed over as a download. */
async function download(event, path, name) {
  event.preventDefault();
  const url = URL.createObjectURL(await call(path, { as: "blob" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function drawings(model) {
  const drawn = model.figures.map(async (name) =>
    element("figure", { id: `figure-${name}` }, await figure(model.id, name), element("figcaption", { textContent: MEANING[name] ?? "" })),
  );
  return section("Figures", "Point at a mark for its numbers.", element("div", { className: "figures" }, ...(await Promise.all(drawn))));
}

function summary(model) {
  const accuracy = model.metrics.accuracy;
  return facts([
    ["revision", element("code", { textContent: model.revision })],
    ["base model", model.base_model],
    ["trained", model.trained ?? "not recorded"],
    ["loaded", new Date(1000 * model.created).toISOString().replace("T", " ").slice(0, 19) + " UTC"],
    ["computes in", `${model.dtype}, ${model.forward_path} rows: ${model.forward_reason}`],
    ["longest text", counted(model.max_length, "token")],
    ...(accuracy === undefined ? [] : [["test accuracy", `${percent(accuracy)} of pairs ranked right`]]),
  ]);
}

async function render() {
  addThemeButton();
  const name = decodeURIComponent(location.pathname.replace(/^\/models\//, ""));
  const main = byId("model");
  try {
    const model = await call(`/v1/models/${encodeURIComponent(name)}`);
    document.title = `${model.id} · marginrm`;
    byId("title").textContent = model.id;
    const playground = element("a", { href: "/", textContent: "Try it in the playground" });
    main.replaceChildren(
      section("What it is", "", summary(model), element("p", {}, playground)),
      ...(model.figures.length ? [await drawings(model)] : []),
      calibration(model),
      ...(Object.keys(model.metrics).length ? [section("Measures", "On test pairs; 95% intervals in brackets.", facts(measures(model.metrics)))] : []),
      section("How it reads a text", "", facts(Object.entries(model.reading).map(([key, value]) => [words(key), shown(value)]))),
      model.method ? section("Method", "", shown(model.method)) : section("Method", "Not recorded: the model was trained elsewhere."),
      ...(model.data.length ? [section("Data", "", table(model.data))] : []),
      golden(model),
      drift(model),
      ...[documentLinks(model)].filter(Boolean),
      ...(Object.keys(model.versions).length ? [section("Versions", "At training.", shown(model.versions))] : []),
    );
  } catch (error) {
    main.replaceChildren(element("p", { className: "alarm", role: "alert", textContent: error.message }));
  }
}

render();
