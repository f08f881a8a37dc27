// Small helpers. Text only ever becomes text nodes; nothing here, or anywhere, makes HTML of it.

export const byId = (id) => document.getElementById(id);

/** An element with properties, data-* values and children; strings become text. */
export function el(tag, { data = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

export function show(element, visible) {
  element.hidden = !visible;
}

/** Say `words` in a note and show it; "" hides it. */
export function note(element, words, kind = "info") {
  element.textContent = words;
  element.dataset.kind = kind;
  show(element, words !== "");
}

let pending;

/** Tell a screen reader, politely; of several things said at once, the last. */
export function announce(words) {
  clearTimeout(pending);
  pending = setTimeout(() => {
    byId("announce").textContent = words;
  }, 100);
}

const whole = new Intl.NumberFormat("en");

export const count = (number, noun) =>
  `${whole.format(number)} ${noun}${number === 1 ? "" : "s"}`;

export function percent(share) {
  if (share > 0 && share < 0.001) return "< 0.1%";
  if (share < 1 && share > 0.999) return "> 99.9%";
  return `${(100 * share).toFixed(1)}%`;
}

export const capital = (word) => word.charAt(0).toUpperCase() + word.slice(1);

/** Which colour a label has: the known ones their own, others by their place. */
export function tone(label, labels = []) {
  const known = ["positive", "negative", "neutral", "uncertain", "error"];
  if (known.includes(label)) return label;
  return `other-${Math.max(0, labels.indexOf(label)) % 4}`;
}
