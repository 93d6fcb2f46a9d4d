// One model's half of the results: the ranking as bars, and the first two on the model's own calibration.
import { confidenceOf, counted, decimal, element, letters, percent, signed } from "./dom.js";
import { call, figure } from "./server.js";
import { sentenceEffects } from "./sentences.js";

const EXCERPT = 240; // characters of a candidate that are shown in its line

/** A ranking and its evidence. `node` is on the page; `show` fills it. */
export class Side {
  /** @param {string} model @param {boolean} named Whether to head it with the model's name. */
  constructor(model, named) {
    this.model = model;
    this.detail = null;
    this.lines = new Map(); // by the candidate's place among the cards
    this.headline = element("p", { className: "headline", role: "status" });
    this.list = element("ol", { className: "ranking" });
    this.note = element("p", { className: "note" });
    this.evidence = element("section", { className: "evidence", "aria-label": "The first two on the model's calibration", hidden: true });
    const title = named ? element("h2", { textContent: model }) : null;
    this.node = element("section", { className: "side", "aria-label": `Ranking by ${model}` }, title, this.headline, this.list, this.note, this.evidence);
  }

  /** Loads what `/v1/models/{name}` says; figures are fetched anew when they are next needed. */
  async load() {
    this.detail = await call(`/v1/models/${encodeURIComponent(this.model)}`);
    this.figures = new Map();
  }

  /**
   * @param {import("./state.js").State & {places: number[]}} state What was asked.
   * @param {any} outcome The prompt's outcome of `POST /best-of-n`.
   * @param {any} usage
   */
  async show(state, outcome, usage) {
    this.state = state;
    const entries = outcome.ranking ?? [];
    const refused = outcome.error ? state.candidates.map((_, candidate) => ({ candidate, error: outcome.error })) : (outcome.errors ?? []);
    this.headline.textContent = this.#headline(outcome, entries, refused);
    this.#draw(entries, refused);
    const floor = entries.length > 1 ? "Bars begin at the lowest reward, as rewards have no zero. " : "";
    this.note.textContent = `${floor}${counted(usage.tokens, "token")}, of which ${usage.tokens_computed.toLocaleString("en")} were computed.`;
    await this.#showEvidence(outcome, entries);
  }

  #headline(outcome, entries, refused) {
    if (!entries.length) return "No candidate could be scored.";
    const best = letters(this.state.places[entries[0].candidate]);
    const rest = refused.length ? ` ${counted(refused.length, "candidate")} refused.` : "";
    if (entries.length === 1) return `${best} is the only candidate that was scored.${rest}`;
    const second = letters(this.state.places[entries[1].candidate]);
    if (outcome.tie) return `${best} and ${second} are a tie: ${percent(outcome.confidence)} is below ${percent(this.state.tie_below)}.${rest}`;
    return `${best} is better than ${second} with ${percent(outcome.confidence)} confidence.${rest}`;
  }

  #draw(entries, refused) {
    const rewards = entries.map((entry) => entry.reward);
    const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
    const nexts = entries.slice(1).map((entry, place) => this.#comparison(entries[place], entry));
    const shown = new Set();
    const order = [];
    for (const [rank, entry] of entries.entries()) {
      const line = this.#line(entry.candidate, shown);
      const share = high > low ? (entry.reward - low) / (high - low) : 1;
      const tied = Boolean(nexts[rank]?.tie || nexts[rank - 1]?.tie);
      line.update({ entry, share, tied, next: nexts[rank], following: entries[rank + 1] });
      order.push(line.node);
    }
    for (const { candidate, error } of refused) {
      const line = this.#line(candidate, shown);
      line.refuse(error.message);
      order.push(line.node);
    }
    for (const [place, line] of this.lines) {
      if (shown.has(place)) continue;
      line.node.remove();
      this.lines.delete(place);
    }
    if (order.some((node, place) => this.list.children[place] !== node)) this.list.append(...order);
  }

  #comparison(better, worse) {
    const margin = better.reward - worse.reward;
    const confidence = confidenceOf(margin, this.detail.temperature);
    return { margin, confidence, tie: margin === 0 || confidence < this.state.tie_below };
  }

  #line(candidate, shown) {
    const place = this.state.places[candidate];
    shown.add(place);
    if (!this.lines.has(place)) this.lines.set(place, new Line(place, this));
    const line = this.lines.get(place);
    line.setText(this.state.candidates[candidate]);
    return line;
  }

  async #showEvidence(outcome, entries) {
    const calibration = this.detail.calibration;
    this.evidence.hidden = entries.length < 2;
    if (entries.length < 2) return;
    if (!calibration) {
      this.evidence.replaceChildren(element("p", { className: "note", textContent: "This model is not calibrated: T = 1 and its confidences are rough. `marginrm calibrate` fits a temperature." }));
      return;
    }
    const drawn = [];
    for (const [name, value, text] of [
      ["margins", outcome.margin, placeOfMargin(outcome.margin, calibration.margin_quantiles)],
      ["reliability", Math.max(outcome.confidence, 1 - outcome.confidence), placeOfConfidence(outcome.confidence, calibration.reliability)],
    ]) {
      if (!this.detail.figures.includes(name)) continue;
      if (!this.figures.has(name)) this.figures.set(name, figure(this.model, name));
      const svg = await this.figures.get(name);
      markAt(svg, value);
      drawn.push(element("figure", { "data-figure": name }, svg, element("figcaption", { textContent: text })));
    }
    const measured = `The margin of ${signed(outcome.margin)} on the ${calibration.n.toLocaleString("en")} pairs that the model was calibrated on (T = ${decimal(calibration.temperature, 2)})`;
    this.evidence.replaceChildren(element("h2", { textContent: measured }), element("div", { className: "figures" }, ...drawn));
  }
}

/** One candidate's line in a ranking. */
class Line {
  constructor(place, side) {
    this.side = side;
    this.who = element("span", { className: "who", textContent: letters(place) });
    this.text = element("span", { className: "text", dir: "auto" });
    this.reward = element("span", { className: "reward" });
    this.fill = element("div", { className: "fill" });
    this.track = element("div", { className: "track", "aria-hidden": "true" }, this.fill);
    this.facts = element("span");
    this.button = element("button", { type: "button", textContent: "Which sentences?", "aria-label": `Which sentences of ${letters(place)} carry its reward?` });
    this.steps = element("ol", { className: "steps", hidden: true, "aria-label": "Reward at each step" });
    this.more = element("div");
    this.button.addEventListener("click", () => this.#explain());
    this.node = element(
      "li",
      { className: "place" },
      element("div", { className: "head" }, this.who, this.text, this.reward),
      this.track,
      element("div", { className: "why" }, this.facts, this.button),
      this.steps,
      this.more,
    );
  }

  setText(text) {
    if (this.whole === text) return;
    this.whole = text;
    this.text.textContent = text.slice(0, EXCERPT).replace(/\s+/g, " ");
    this.more.replaceChildren(); // its sentences were those of the text before
  }

  update({ entry, share, tied, next, following }) {
    this.node.className = tied ? "place tied" : "place";
    this.reward.textContent = decimal(entry.reward);
    this.track.hidden = this.button.hidden = false;
    this.fill.style.width = `${(100 * share).toFixed(2)}%`;
    const notes = [`P(best) ${percent(entry.p_best)}`];
    if (next) {
      const other = letters(this.side.state.places[following.candidate]);
      notes.unshift(next.tie ? `tie with ${other}: margin ${signed(next.margin)}, ${percent(next.confidence)}` : `${signed(next.margin)} over ${other}, ${percent(next.confidence)} sure`);
    }
    if (entry.truncated) notes.push("its prompt was cut");
    if (typeof entry.margin_std === "number") notes.push(`margin ± ${decimal(entry.margin_std)}`);
    if (typeof entry.familiarity === "number") notes.push(`familiarity ${percent(entry.familiarity)}`);
    this.facts.textContent = notes.join(" · ");
    this.#showSteps(entry.steps);
  }

  refuse(message) {
    this.node.className = "place refused";
    this.reward.textContent = "refused";
    this.track.hidden = this.button.hidden = this.steps.hidden = true;
    this.facts.textContent = message;
  }

  /** Colours the steps of a process reward model: above or below the mean of this response. */
  #showSteps(steps) {
    this.steps.hidden = !Array.isArray(steps) || !steps.length;
    if (this.steps.hidden) return;
    const rewards = steps.map((step) => (typeof step === "number" ? step : step.reward));
    const mean = rewards.reduce((sum, one) => sum + one, 0) / rewards.length;
    const chips = rewards.map((reward, place) =>
      element("li", { className: reward >= mean ? "up" : "down", textContent: `${place + 1}: ${decimal(reward, 2)}` }),
    );
    this.steps.replaceChildren(...chips);
  }

  async #explain() {
    this.button.disabled = true;
    const whole = this.whole;
    try {
      const shown = await sentenceEffects(this.side.state, whole, this.side.model);
      if (whole === this.whole) this.more.replaceChildren(shown);
    } catch (error) {
      this.more.replaceChildren(element("p", { className: "alarm", role: "alert", textContent: error.message }));
    } finally {
      this.button.disabled = false;
    }
  }
}

/** Draws a line at a value of a figure's horizontal axis, in the place of an older one. */
function markAt(svg, value) {
  const [low, high, left, right] = svg.dataset.x.split(" ").map(Number);
  const [, , bottom, top] = svg.dataset.y.split(" ").map(Number);
  const x = left + Math.min(1, Math.max(0, (value - low) / (high - low))) * (right - left);
  svg.querySelectorAll(".here").forEach((old) => old.remove());
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [name, at] of Object.entries({ x1: x, x2: x, y1: bottom, y2: top, class: "here" })) line.setAttribute(name, at);
  svg.append(line);
}

/** Says how large a margin is beside those of the calibration pairs, by their quantiles. */
function placeOfMargin(margin, quantiles) {
  const points = Object.entries(quantiles).map(([share, value]) => [Number(share), value]).sort((a, b) => a[0] - b[0]);
  const below = (at) => {
    const after = points.findIndex(([, value]) => value >= at);
    if (after === 0) return points[0][0];
    if (after < 0) return points.at(-1)[0];
    const [[p0, v0], [p1, v1]] = [points[after - 1], points[after]];
    return v1 > v0 ? p0 + ((p1 - p0) * (at - v0)) / (v1 - v0) : p1;
  };
  const share = Math.max(0, below(Math.abs(margin)) - below(-Math.abs(margin)));
  return `Larger in size than about ${percent(share)} of the calibration pairs' margins.`;
}

/** Says how often pairs of like confidence were ranked right. */
function placeOfConfidence(confidence, bins) {
  const sure = Math.max(confidence, 1 - confidence);
  const bin = bins.find((one) => sure >= one.lower && (sure < one.upper || one.upper === 1));
  if (!bin?.count) return `No calibration pair had a confidence near ${percent(sure)}.`;
  return `Of ${counted(bin.count, "pair")} with a confidence from ${percent(Math.max(0.5, bin.lower))} to ${percent(bin.upper)}, ${percent(bin.accuracy)} were ranked right.`;
}
