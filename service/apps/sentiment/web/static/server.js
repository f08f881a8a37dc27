// The server's state: asked for again and again, told in words, and waited for.

import { getState } from "./api.js";
import { announce, byId } from "./dom.js";

const CALM_MS = 8000;
const ANXIOUS_MS = 1500;

const WORDS = {
  ready: (model) => `Ready: ${describe(model)}`,
  loading: () => "The model server is loading its model. This page goes on when it is ready.",
  busy: () => "The model server is busy. Answers may take longer.",
  gone: () => "The model server does not answer. Trying again every two seconds.",
  offline: () => "This page’s own server does not answer. Trying again every two seconds.",
};

export const server = new EventTarget();
server.state = "asking";
server.details = null;

let timer;
let asking = false;

function describe(model) {
  if (!model) return "the model is loaded";
  const size = model.num_parameters;
  const unit = size >= 1e9 ? `${(size / 1e9).toFixed(1)} B` : `${(size / 1e6).toFixed(1)} M`;
  return `${model.name}, ${unit} parameters, on ${model.device}`;
}

/** Ask now, and from then on at intervals. */
export async function ask() {
  clearTimeout(timer);
  if (asking) return;
  asking = true;
  let state = "offline";
  try {
    const details = await getState(AbortSignal.timeout(10_000));
    state = details.state;
    server.details = details;
  } catch {
    // The words say it.
  }
  asking = false;
  tell(state);
  // A page in the background can wait until it is looked at.
  if (!document.hidden) {
    timer = setTimeout(ask, state === "ready" ? CALM_MS : ANXIOUS_MS);
  }
}

function tell(state) {
  const words = WORDS[state]?.(server.details?.model) ?? state;
  const shown = byId("server-words");
  if (shown.textContent !== words) shown.textContent = words;
  byId("server").dataset.state = state;
  const before = server.state;
  server.state = state;
  if (before !== state) {
    // Coming up as expected is no news; anything else is.
    if (before !== "asking" || state !== "ready") announce(words);
  }
  server.dispatchEvent(new Event("state"));
}

/** Resolves once the server can answer; rejects when `signal` is aborted. */
export function ready(signal) {
  ask();
  return new Promise((resolve, reject) => {
    const check = () => {
      if (server.state !== "ready") return;
      server.removeEventListener("state", check);
      resolve();
    };
    server.addEventListener("state", check);
    signal.addEventListener("abort", () => {
      server.removeEventListener("state", check);
      reject(signal.reason);
    });
  });
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) ask();
});
