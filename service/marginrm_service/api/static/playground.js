"use strict";
// The page at "/": it asks the server what every client may ask, and shows what comes back.

const byId = (id) => document.getElementById(id);
const percent = (value) => `${(100 * value).toFixed(value > 0.995 || value < 0.005 ? 1 : 0)} %`;
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
let models = [];

async function call(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const response = await fetch(path, options);
  const reply = await response.json();
  if (!response.ok) throw new Error(reply.error ? reply.error.message : `The server answered ${response.status}.`);
  return reply;
}

function showProblem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

function showFacts() {
  const model = models.find((one) => one.id === byId("model").value);
  if (!model) return;
  const calibration = model.calibrated
    ? `calibrated, T = ${model.temperature.toFixed(2)}`
    : "not calibrated: its confidences are rough";
  byId("facts").textContent =
    `${model.base_model} · ${model.revision} · ${model.dtype} · ${calibration} · up to ` +
    `${model.max_length.toLocaleString()} tokens · ${model.forward_path} forward`;
  byId("facts").title = model.forward_reason;
}

async function loadModels() {
  try {
    await call("/readyz");
    models = (await call("/v1/models")).data;
  } catch (error) {
    byId("facts").textContent = error.message;
    setTimeout(loadModels, 1000);
    return;
  }
  byId("model").replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  byId("model").parentElement.hidden = models.length < 2;
  showFacts();
}

function showVerdict(pair) {
  const sure = Math.max(pair.confidence, 1 - pair.confidence);
  const better = pair.margin > 0 ? "A" : "B";
  const headline =
    pair.verdict === "tie" ? "Too close to call." : `${better} is better, with ${percent(sure)} confidence.`;
  const output = byId("verdict");
  output.querySelector(".headline").textContent = headline;
  const fill = output.querySelector(".fill");
  fill.style.left = `${50 * Math.min(2 * (1 - pair.confidence), 1)}%`;
  fill.style.right = `${50 * Math.min(2 * pair.confidence, 1)}%`;
  fill.classList.toggle("other", pair.margin < 0);
  output.querySelector(".detail").textContent =
    `Margin ${signed(pair.margin)} (A ${signed(pair.chosen.reward)}, B ${signed(pair.rejected.reward)}); ` +
    `P(A is better) ${percent(pair.confidence)}; ${pair.chosen.tokens} and ${pair.rejected.tokens} tokens.`;
  output.hidden = false;
}

async function compare() {
  const pair = { prompt: byId("prompt").value, chosen: byId("a").value, rejected: byId("b").value };
  const body = { model: byId("model").value, tie_below: Number(byId("tie").value), pairs: [pair] };
  try {
    showVerdict((await call("/score", body)).pairs[0]);
  } catch (error) {
    throw new Error(error.message.replace(/^chosen/, "Response A").replace(/^rejected/, "Response B"));
  }
}

function row(cells, className) {
  const line = document.createElement("tr");
  line.className = className;
  for (const [index, text] of cells.entries()) {
    const cell = line.insertCell();
    cell.textContent = text;
    if (index !== 1) cell.className = "number";
  }
  return line;
}

function showRanking(prompt, candidates) {
  const output = byId("ranking");
  output.querySelector(".headline").textContent =
    prompt.confidence === null
      ? "There is only one candidate that could be scored."
      : prompt.tie
        ? "The first two are too close to call."
        : `The first beats the second with ${percent(prompt.confidence)} confidence (margin ${signed(prompt.margin)}).`;
  const ranked = prompt.ranking.map((entry) =>
    row(
      [entry.rank, candidates[entry.candidate], entry.reward.toFixed(3), percent(entry.p_best)],
      entry.rank === 1 ? "best" : "",
    ),
  );
  const failed = (prompt.errors || []).map((one) =>
    row(["–", `${candidates[one.candidate]} (${one.error.message})`, "", ""], "failed"),
  );
  output.querySelector("tbody").replaceChildren(...ranked, ...failed);
  output.hidden = false;
}

async function rank() {
  const candidates = byId("candidates").value.split(/\n\s*\n/).map((text) => text.trim()).filter(Boolean);
  if (!candidates.length) throw new Error("There is no candidate to rank.");
  const body = {
    model: byId("model").value,
    tie_below: Number(byId("tie").value),
    prompts: [{ prompt: byId("prompt").value, candidates }],
  };
  showRanking((await call("/best-of-n", body)).prompts[0], candidates);
}

function onSubmit(form, action) {
  byId(form).addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = byId(form).querySelector("button");
    button.disabled = true;
    showProblem("");
    try {
      await action();
    } catch (error) {
      showProblem(error.message);
    } finally {
      button.disabled = false;
    }
  });
}

byId("model").addEventListener("change", showFacts);
onSubmit("compare", compare);
onSubmit("rank", rank);
loadModels();
