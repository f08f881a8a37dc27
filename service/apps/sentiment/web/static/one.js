// One text: the form, its limits, and the course of an answer.

import * as answer from "./answer.js";
import { ApiError, classify, countTokens } from "./api.js";
import { announce, byId, capital, count, el, note, show } from "./dom.js";
import { copy, differences, linkTo, readLink } from "./link.js";
import { ask, ready, server } from "./server.js";

const EXAMPLES = [
  "The food was wonderful and the service was extraordinary.",
  "The battery died after two days, and nobody answered my letters.",
  "The parcel arrived on Tuesday.",
  "I expected more.",
];
// These pass by themselves; the page waits for the server and asks again.
const PASSING = ["gone", "loading", "busy", "offline"];
const TYPING_PAUSE_MS = 450;

const form = byId("one");
const text = byId("text");

let running = null; // AbortController of the answer that is being made
let last = null; // the result that a link can be made to
let counting = null;
let countTimer;

export const length = (words) => {
  let characters = 0;
  for (const _ of words) characters += 1;
  return characters;
};

function limit() {
  return server.details?.limits.max_chars ?? Infinity;
}

function template() {
  return byId("template").value || undefined;
}

function templateDetails() {
  return server.details?.templates.find(({ name }) => name === template());
}

// ---- the size of the text ----

function measure(tokens = null) {
  const characters = length(text.value);
  const over = characters > limit();
  const parts = [
    limit() === Infinity
      ? count(characters, "character")
      : `${characters.toLocaleString("en")} of ${count(limit(), "character")}`,
  ];
  if (tokens !== null) {
    parts.push(count(tokens, "token"));
    const reads = templateDetails()?.max_text_tokens ?? server.details?.model?.max_context;
    if (reads && tokens > reads) parts.push("will be read in parts");
  }
  const size = byId("size");
  size.textContent = parts.join(" · ");
  size.dataset.over = over;
  text.setAttribute("aria-invalid", over);
  if (over) refuse(`Too long by ${count(characters - limit(), "character")}.`);
  else refuse("");
  return !over;
}

function refuse(words) {
  const problem = byId("text-problem");
  if (problem.textContent !== words) {
    problem.textContent = words;
    if (words) announce(words);
  }
  show(problem, words !== "");
}

function typed() {
  clearTimeout(countTimer);
  counting?.abort();
  if (!measure() || !text.value.trim() || server.state !== "ready") return;
  countTimer = setTimeout(async () => {
    counting = new AbortController();
    try {
      measure(await countTokens(text.value, template(), counting.signal));
    } catch {
      // The characters are shown; tokens are an extra.
    }
  }, TYPING_PAUSE_MS);
}

// ---- an answer ----

/** Classify what stands in the form; `wanted` is the link that asked for it, if one did. */
async function run(wanted = null) {
  running?.abort();
  if (!measure()) {
    text.focus();
    return;
  }
  if (!text.value.trim()) {
    refuse("Write a text first, or choose an example.");
    text.focus();
    return;
  }
  const seed = byId("seed").value.trim() || "0";
  if (!/^[0-9]{1,19}$/.test(seed)) {
    byId("seed").closest("details").open = true;
    refuse("The seed must be a whole number.");
    byId("seed").focus();
    return;
  }
  const mine = new AbortController();
  running = mine;
  last = null;
  answer.begin();
  show(byId("stop"), true);
  announce("Reading the text.");
  try {
    await answerOf(text.value, seed, mine.signal, wanted);
  } catch (error) {
    if (running === mine) fail(error);
  } finally {
    if (running === mine) {
      running = null;
      if (document.activeElement === byId("stop")) byId("classify").focus();
      show(byId("stop"), false);
    }
  }
}

async function answerOf(words, seed, signal, wanted) {
  while (true) {
    let begun = false;
    try {
      for await (const [name, fields] of classify(words, template(), seed, signal)) {
        if (name === "scored") {
          begun = true;
          answer.scored(fields);
        } else if (name === "explanation") {
          answer.explain(fields.text);
        } else if (name === "result") {
          // As it was sent: a large seed has lost digits on its way through JSON.
          last = { ...fields, seed };
          answer.finish(last);
          if (wanted) note(byId("result-note"), differences(wanted, fields));
          announce(answer.inWords(fields));
        }
      }
      return;
    } catch (error) {
      const waits = error instanceof ApiError && PASSING.includes(error.code) && !begun;
      if (!waits) throw error;
      const words = `${capital(error.message)}. Your text is classified as soon as it can be.`;
      note(byId("result-note"), words);
      announce(words);
      await pause(Math.max(1, error.retryAfter ?? 1), signal);
      await ready(signal);
    }
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

function fail(error) {
  const partial = !byId("result-body").hidden;
  if (error.name === "AbortError") {
    const words = partial ? "Stopped. The answer is incomplete." : "Stopped.";
    note(byId("result-note"), words);
    announce(words);
    answer.end("stopped");
    return;
  }
  if (!(error instanceof ApiError)) throw error;
  const middle = partial ? " in the middle of the answer, which is incomplete" : "";
  const words =
    PASSING.includes(error.code) && partial
      ? `The model server went away${middle}.`
      : `${capital(error.message)}.`;
  note(byId("result-note"), words, "problem");
  announce(words);
  answer.end("failed");
  ask();
}

// ---- the form ----

function examples() {
  byId("examples").replaceChildren(
    ...EXAMPLES.map((example) => {
      const button = el("button", { type: "button" }, example);
      button.addEventListener("click", () => {
        text.value = example;
        run();
        typed();
      });
      return el("li", {}, button);
    }),
  );
}

function offerTemplates() {
  const select = byId("template");
  const templates = server.details?.templates ?? [];
  if (select.options.length === templates.length) return;
  select.replaceChildren(
    ...templates.map(({ name, description }) =>
      el("option", { value: name }, description ? `${name}: ${description}` : name),
    ),
  );
}

function followLink() {
  const wanted = readLink(location.hash);
  if (wanted === null) return;
  text.value = wanted.text;
  byId("seed").value = wanted.seed;
  const select = byId("template");
  const has = [...select.options].some(({ value }) => value === wanted.template);
  if (has) select.value = wanted.template;
  run(wanted);
  typed();
}

async function copyLink() {
  const link = linkTo(last);
  byId("link").value = link;
  if (await copy(link)) {
    byId("copied").textContent = "Copied.";
    announce("Link copied.");
    return;
  }
  show(byId("link-field"), true);
  byId("link").focus();
  byId("link").select();
}

export function startOne() {
  examples();
  measure();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  text.addEventListener("input", typed);
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      run();
    }
  });
  byId("template").addEventListener("change", typed);
  byId("stop").addEventListener("click", () => running?.abort());
  byId("again").addEventListener("click", () => {
    byId("classify").focus();
    run();
  });
  byId("copy-link").addEventListener("click", copyLink);
  window.addEventListener("hashchange", followLink);
  server.addEventListener("state", () => {
    offerTemplates();
    if (byId("size").textContent.includes(" of ") === false) measure();
  });
  // The first answer says which templates there are; a link may name one.
  server.addEventListener("state", followLink, { once: true });
}
