// A CSV file: chosen or dropped, looked at, classified row by row, shown and downloaded.

import { ApiError, classifyTable, inspectTable } from "./api.js";
import { drawChart } from "./chart.js";
import { announce, byId, capital, count, el, note, percent, show, tone } from "./dom.js";
import { resultName, save, toCsv } from "./download.js";
import { ask, server } from "./server.js";

const PAGE_ROWS = 50;
const DRAW_EVERY_MS = 250;
const ANNOUNCED_SHARES = [0.25, 0.5, 0.75];
const SEPARATORS = { ",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars" };

let file = null; // { name, content, table }
let job = null; // { results, columns, labels, column, total, controller, startedAt }
let shownRows = PAGE_ROWS;
let drawTimer = null;

// ---- choosing ----

async function open(chosen) {
  job?.controller.abort();
  note(byId("file-problem"), "");
  const limit = server.details?.limits.max_csv_bytes ?? Infinity;
  if (chosen.size > limit) {
    refuse(`“${chosen.name}” is larger than ${size(limit)}, which is the limit.`);
    return;
  }
  try {
    const content = await chosen.arrayBuffer();
    await inspect(chosen.name, content, null);
  } catch (error) {
    refuse(`“${chosen.name}” cannot be used: ${error.message}.`);
    return;
  }
  show(byId("table-result"), false);
  job = null;
  byId("table-start").focus();
}

function refuse(words) {
  show(byId("table-form"), false);
  note(byId("file-problem"), words, "problem");
  announce(words);
}

async function inspect(name, content, header) {
  const table = await inspectTable(content, header);
  file = { name, content, table };
  byId("file-name").textContent = name;
  const facts = [
    count(table.rows, "row"),
    count(table.columns.length, "column"),
    table.delimiter
      ? `${table.encoding}, separated by ${SEPARATORS[table.delimiter]}`
      : table.encoding,
  ];
  byId("file-facts").textContent = facts.join(" · ");
  byId("header").checked = table.has_header;
  byId("column").replaceChildren(
    ...table.columns.map((column, index) => el("option", { value: index }, column)),
  );
  byId("column").value = table.column;
  byId("table-start").textContent = `Classify ${count(table.rows, "row")}`;
  preview();
  note(byId("table-note"), "");
  show(byId("progress-box"), false);
  show(byId("table-continue"), false);
  show(byId("table-form"), true);
  announce(`${name}: ${facts[0]}.`);
}

function preview() {
  const { columns, preview: rows } = file.table;
  const chosen = Number(byId("column").value);
  const mark = (index) => ({ data: { chosen: index === chosen } });
  const table = byId("preview");
  table.tHead.replaceChildren(
    el(
      "tr",
      {},
      ...columns.map((name, index) => el("th", { scope: "col", ...mark(index) }, name)),
    ),
  );
  table.tBodies[0].replaceChildren(
    ...rows.map((cells) =>
      el("tr", {}, ...columns.map((_, index) => el("td", mark(index), cells[index] ?? ""))),
    ),
  );
}

const size = (bytes) => `${(bytes / 1024 / 1024).toLocaleString("en")} MiB`;

// ---- classifying ----

async function start() {
  job?.controller.abort();
  const template = byId("template").value;
  const labels = server.details?.templates.find(({ name }) => name === template)?.labels ?? [];
  job = {
    results: [],
    columns: file.table.columns,
    labels,
    column: Number(byId("column").value),
    total: file.table.rows,
    query: {
      template,
      seed: byId("seed").value.trim() || "0",
      header: Number(byId("header").checked),
      column: byId("column").value,
      explain: Number(byId("explain").checked),
    },
  };
  shownRows = PAGE_ROWS;
  offerFilter();
  byId("filter").value = "";
  await proceed(job);
}

/** Classify from the first row that has no result yet. */
async function proceed(mine) {
  mine.controller = new AbortController();
  mine.startedAt = performance.now();
  mine.doneBefore = mine.results.length;
  note(byId("table-note"), "");
  show(byId("table-cancel"), true);
  show(byId("table-continue"), false);
  show(byId("progress-box"), true);
  show(byId("table-result"), true);
  draw();
  announce(`Classifying ${count(mine.total, "row")}.`);
  try {
    const query = { ...mine.query, first: mine.results.length };
    for await (const [name, fields] of classifyTable(
      file.content,
      query,
      mine.controller.signal,
    )) {
      if (job !== mine) return;
      if (name === "row") take(mine, fields);
    }
    finished(mine);
  } catch (error) {
    if (job === mine) interrupted(mine, error);
  } finally {
    if (job === mine) {
      const hadFocus = document.activeElement === byId("table-cancel");
      show(byId("table-cancel"), false);
      if (hadFocus) byId(byId("table-continue").hidden ? "table-start" : "table-continue").focus();
      draw();
    }
  }
}

function take(mine, fields) {
  const before = mine.results.length / mine.total;
  mine.results.push(fields);
  const after = mine.results.length / mine.total;
  if (ANNOUNCED_SHARES.some((share) => before < share && after >= share)) {
    announce(`${mine.results.length} of ${count(mine.total, "row")} done.`);
  }
  // A fast server sends more rows than a screen can be drawn for.
  drawTimer ??= setTimeout(draw, DRAW_EVERY_MS);
}

function finished(mine) {
  const errors = mine.results.filter(({ error }) => error).length;
  const words = errors
    ? `${count(mine.total, "row")} done; ${count(errors, "row")} could not be classified.`
    : `${count(mine.total, "row")} done.`;
  note(byId("table-note"), words, errors ? "uncertain" : "info");
  announce(words);
}

function interrupted(mine, error) {
  const kept = `${mine.results.length} of ${count(mine.total, "row")} are done and kept.`;
  const stopped = error.name === "AbortError";
  if (!stopped && !(error instanceof ApiError)) throw error;
  const words = stopped ? `Cancelled. ${kept}` : `${capital(error.message)}. ${kept}`;
  note(byId("table-note"), words, stopped ? "info" : "problem");
  announce(words);
  show(byId("table-continue"), mine.results.length < mine.total);
  if (!stopped) ask();
}

// ---- showing ----

const kind = (row) => (row.error ? "error" : row.label);

function offerFilter() {
  const kinds = [...job.labels, "uncertain", "error"];
  byId("filter").replaceChildren(
    el("option", { value: "" }, "All rows"),
    ...kinds.map((name) =>
      el("option", { value: name }, name === "error" ? "Rows with an error" : capital(name)),
    ),
  );
}

function draw() {
  clearTimeout(drawTimer);
  drawTimer = null;
  if (!job) return;
  const { results, labels, total } = job;
  byId("progress").max = total;
  byId("progress").value = results.length;
  byId("progress-words").textContent = progressWords();
  const counts = new Map([...labels, "uncertain"].map((label) => [label, 0]));
  for (const row of results) counts.set(kind(row), (counts.get(kind(row)) ?? 0) + 1);
  drawChart([...counts], labels);
  drawRows();
}

function progressWords() {
  const done = job.results.length;
  const errors = job.results.filter(({ error }) => error).length;
  const parts = [`${done.toLocaleString("en")} of ${count(job.total, "row")}`];
  if (errors) parts.push(count(errors, "error"));
  const now = done - job.doneBefore;
  const running = !byId("table-cancel").hidden;
  if (running && now >= 5 && done < job.total) {
    const seconds = ((performance.now() - job.startedAt) / 1000 / now) * (job.total - done);
    parts.push(
      seconds < 60
        ? `about ${Math.ceil(seconds)} s left`
        : `about ${Math.ceil(seconds / 60)} min left`,
    );
  }
  return parts.join(" · ");
}

function drawRows() {
  const wanted = byId("filter").value;
  const rows = wanted ? job.results.filter((row) => kind(row) === wanted) : job.results;
  const body = byId("rows").tBodies[0];
  const key = `${wanted}/${job.query.column}`;
  // Rows only ever come at the end: what is there stays, so that reading is not disturbed.
  if (body.dataset.key !== key || body.rows.length > rows.length || body.job !== job) {
    body.replaceChildren();
    body.dataset.key = key;
    body.job = job;
  }
  for (const row of rows.slice(body.rows.length, shownRows)) body.append(rowOf(row));
  show(byId("more"), rows.length > body.rows.length);
  byId("more").textContent = `Show more of ${count(rows.length, "row")}`;
}

function rowOf(row) {
  const text = el("div", { className: "text" }, row.cells[job.column] ?? "");
  const because = row.error ?? row.uncertain_reason ?? row.explanation;
  const cell = el("td", {}, text);
  if (because) cell.append(el("div", { className: "because" }, capital(because)));
  const verdict = el("td", { data: { label: tone(kind(row), job.labels) } });
  verdict.append(el("div", { className: "label" }, capital(kind(row))));
  if (!row.error) {
    const chance = percent(row.probabilities[row.scored_label]);
    const words = row.label === "uncertain" ? `${chance} ${row.scored_label}` : chance;
    verdict.append(el("div", { className: "share" }, words));
  }
  return el("tr", {}, el("td", { className: "number" }, `${row.line}`), cell, verdict);
}

// ---- wiring ----

export function startMany() {
  byId("file").addEventListener("change", (event) => {
    const [chosen] = event.target.files;
    // The same file can be chosen again after it was changed.
    event.target.value = "";
    if (chosen) open(chosen);
  });
  byId("header").addEventListener("change", async (event) => {
    try {
      await inspect(file.name, file.content, event.target.checked);
    } catch (error) {
      note(byId("table-note"), `${capital(error.message)}.`, "problem");
    }
  });
  byId("column").addEventListener("change", preview);
  byId("table-form").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  byId("table-cancel").addEventListener("click", () => job?.controller.abort());
  byId("table-continue").addEventListener("click", () => {
    byId("table-start").focus();
    proceed(job);
  });
  byId("filter").addEventListener("change", () => {
    shownRows = PAGE_ROWS;
    drawRows();
  });
  byId("more").addEventListener("click", () => {
    shownRows += PAGE_ROWS;
    drawRows();
  });
  byId("download").addEventListener("click", () => {
    save(toCsv(job.columns, job.labels, job.results), resultName(file.name));
  });
  server.addEventListener("state", () => {
    const limits = server.details?.limits;
    if (limits) {
      const rows = count(limits.max_csv_rows, "row");
      byId("file-help").textContent = `At most ${rows} and ${size(limits.max_csv_bytes)}.`;
    }
  });
  dropping();
}

function dropping() {
  const veil = byId("drop-veil");
  const hasFile = (event) => event.dataTransfer?.types.includes("Files");
  window.addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    show(veil, true);
  });
  window.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) show(veil, false);
  });
  window.addEventListener("drop", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    show(veil, false);
    const [dropped] = event.dataTransfer.files;
    if (dropped) open(dropped);
  });
}
