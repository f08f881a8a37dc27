// Shows the answer to one text while it is made.

import { byId, capital, el, note, percent, show, tone } from "./dom.js";

const bars = byId("bars");

/** Start over, for a text with these labels. */
export function begin() {
  byId("result").dataset.phase = "asking";
  byId("result").setAttribute("aria-busy", "true");
  show(byId("result-empty"), false);
  show(byId("result-body"), false);
  show(byId("result-actions"), false);
  show(byId("again"), false);
  show(byId("copy-link"), false);
  show(byId("link-field"), false);
  byId("copied").textContent = "";
  note(byId("result-note"), "Reading the text…");
  byId("explanation").textContent = "";
  show(byId("why"), true);
  show(byId("in-text"), false);
  note(byId("parts"), "");
  byId("facts").replaceChildren();
}

/** The labels are scored; the explanation is about to come. */
export function scored({ label, probabilities, uncertain_reason, num_parts }) {
  byId("result").dataset.phase = "writing";
  note(byId("result-note"), "");
  show(byId("result-body"), true);
  verdict(label, probabilities, uncertain_reason);
  if (num_parts > 1) note(byId("parts"), partsInWords(num_parts));
}

export function explain(delta) {
  byId("explanation").append(delta);
}

/** The whole result. */
export function finish(result) {
  verdict(result.label, result.probabilities, result.uncertain_reason);
  byId("explanation").textContent = result.explanation;
  show(byId("why"), result.explanation !== "");
  mark(result);
  note(byId("parts"), result.num_parts > 1 ? partsInWords(result.num_parts, result) : "");
  facts(result);
  show(byId("copy-link"), true);
  end("done");
}

/** No more comes: `done`, `stopped` or `failed`. */
export function end(phase) {
  byId("result").dataset.phase = phase;
  byId("result").setAttribute("aria-busy", "false");
  show(byId("result-actions"), true);
  show(byId("again"), phase !== "done");
}

/** One sentence for a screen reader. */
export function inWords(result) {
  const chance = percent(result.probabilities[result.scored_label]);
  const label =
    result.label === "uncertain"
      ? `Uncertain: ${result.uncertain_reason}.`
      : `${capital(result.label)}, ${chance}.`;
  return `${label} ${result.explanation}`.trim();
}

function verdict(label, probabilities, reason) {
  const names = Object.keys(probabilities);
  const first = names.reduce((a, b) => (probabilities[b] > probabilities[a] ? b : a));
  const heading = byId("verdict");
  heading.textContent = capital(label);
  heading.dataset.label = tone(label, names);
  byId("verdict-detail").textContent = reason
    ? `The model does not settle on one label.`
    : `with a probability of ${percent(probabilities[first])}`;
  note(byId("uncertain"), reason ? `Why uncertain: ${reason}.` : "", "uncertain");
  if (bars.children.length !== names.length) bars.replaceChildren(...names.map(() => bar()));
  names.forEach((name, index) => {
    const item = bars.children[index];
    item.dataset.label = tone(name, names);
    const [shownName, value, track] = item.children;
    shownName.textContent = capital(name);
    value.textContent = percent(probabilities[name]);
    shownName.className = name === first ? "name first" : "name";
    value.className = name === first ? "value first" : "value";
    // Through the style's own interface, which a strict policy allows, not an attribute.
    track.firstElementChild.style.setProperty("--share", probabilities[name]);
  });
}

function bar() {
  const track = el("div", { className: "track" }, el("div", { className: "fill" }));
  track.setAttribute("aria-hidden", "true");
  return el("li", {}, el("span"), el("span"), track);
}

function partsInWords(number, result) {
  const about = result?.explanation
    ? ` The explanation is about part ${result.explained_part + 1}.`
    : "";
  const how = result?.pooling ? ` (${result.pooling})` : "";
  return (
    `The text is longer than the model reads at once. It was split into ${number} parts by ` +
    `sentences, and their probabilities were pooled${how}.${about}`
  );
}

function mark({ text, highlights, missing_words }) {
  // Places count code points, JavaScript's strings count UTF-16 units.
  const characters = Array.from(text);
  const pieces = [];
  let at = 0;
  for (const { start, end } of [...highlights].sort((a, b) => a.start - b.start)) {
    if (start < at) continue;
    pieces.push(characters.slice(at, start).join(""));
    pieces.push(el("mark", {}, characters.slice(start, end).join("")));
    at = end;
  }
  pieces.push(characters.slice(at).join(""));
  byId("marked").replaceChildren(...pieces);
  show(byId("marked"), highlights.length > 0);
  const quoted = missing_words.map((word) => `“${word}”`).join(", ");
  byId("missing").textContent = quoted
    ? `The explanation also names ${quoted}, which the text does not have.`
    : "";
  show(byId("missing"), quoted !== "");
  show(byId("in-text"), highlights.length > 0 || quoted !== "");
  // In a long text the first of them may be out of sight.
  const first = byId("marked").querySelector("mark");
  byId("marked").scrollTop = first ? first.offsetTop - byId("marked").offsetTop - 24 : 0;
}

function facts(result) {
  const known = [
    ["First token after", result.ttft_ms === null ? null : `${result.ttft_ms.toFixed(0)} ms`],
    [
      "Speed",
      result.tokens_per_second === null ? null : `${result.tokens_per_second.toFixed(0)} tokens/s`,
    ],
    ["Model", result.model],
    ["Template", `${result.template} v${result.template_version}`],
    ["Seed", `${result.seed}`],
  ];
  byId("facts").replaceChildren(
    ...known
      .filter(([, value]) => value !== null)
      .map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
  );
}
