// Results as a CSV file that a spreadsheet can open without running anything in it.

// What spreadsheets take for a formula, in both widths; a plain number is none.
const FORMULA = /^[\s]*[=+\-@\uff1d\uff0b\uff0d\uff20]|^[\t\r\n]/;
// Within a cell, where a spreadsheet that splits at another character would see a cell's start;
// ";-)" is none: a formula goes on with a name, a number, a text or a bracket.
const INNER_FORMULA = /((?:[;|]|(?<!^)\t)[ \r\n]*)(?=[=+@-][ =+@-]*[\p{L}\p{N}_"'(])/gu;
const NUMBER = /^[+-]?\d+([.,]\d+)?$/;

/** A cell that is text, whatever it looks like (OWASP, "CSV Injection"). */
export function guard(cell) {
  const inner = cell.replace(INNER_FORMULA, "$1'");
  return FORMULA.test(inner) && !NUMBER.test(inner) ? `'${inner}` : inner;
}

function quote(cell) {
  const safe = guard(String(cell ?? ""));
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** Lines of the file's own columns, then ours. */
export function toCsv(columns, labels, rows) {
  const head = [
    "line",
    ...columns,
    "sentiment_label",
    "sentiment_scored_label",
    ...labels.map((label) => `probability_${label}`),
    "sentiment_explanation",
    "sentiment_uncertain_reason",
    "sentiment_error",
  ];
  const lines = rows.map((row) => [
    row.line,
    ...columns.map((_, index) => row.cells[index] ?? ""),
    row.label ?? "",
    row.scored_label ?? "",
    ...labels.map((label) => row.probabilities?.[label]?.toFixed(6) ?? ""),
    row.explanation ?? "",
    row.uncertain_reason ?? "",
    row.error ?? "",
  ]);
  return [head, ...lines].map((cells) => `${cells.map(quote).join(",")}\r\n`).join("");
}

/** Save `content` as a file. The mark at its start makes spreadsheets read it as UTF-8. */
export function save(content, name) {
  const url = URL.createObjectURL(new Blob(["\ufeff", content], { type: "text/csv" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** `my reviews.csv` -> `my reviews-sentiment.csv`, of harmless characters. */
export function resultName(fileName) {
  const stem = fileName.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N} ._-]+/gu, "_");
  return `${stem.slice(0, 80) || "table"}-sentiment.csv`;
}
