// Rows by label as bars: SVG for the eye, one sentence and a table for everybody.

import { byId, capital, count, el, percent, tone } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const ROW_PX = 46;

function svg(tag, attributes, text = "") {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** `counts`: [label, rows] pairs in the order they are shown. */
export function drawChart(counts, labels) {
  const total = counts.reduce((sum, [, rows]) => sum + rows, 0);
  const most = Math.max(1, ...counts.map(([, rows]) => rows));
  const share = (rows) => (total ? rows / total : 0);
  const sentence = counts
    .map(([label, rows]) => `${label} ${rows} (${percent(share(rows))})`)
    .join(", ");
  // Widths in percent and no viewBox: on a narrow screen bars shrink and letters do not.
  const picture = svg("svg", {
    role: "img",
    height: counts.length * ROW_PX,
    "aria-label": `Bar chart of ${count(total, "row")} by label: ${sentence}`,
  });
  counts.forEach(([label, rows], index) => {
    const y = index * ROW_PX;
    const group = svg("g", { "data-label": tone(label, labels) });
    group.append(
      svg("text", { x: 0, y: y + 16 }, capital(label)),
      svg(
        "text",
        { x: "100%", y: y + 16, "text-anchor": "end", class: "amount" },
        `${rows.toLocaleString("en")} · ${percent(share(rows))}`,
      ),
      svg("rect", { class: "track-bar", y: y + 24, width: "100%", height: 10, rx: 5 }),
      svg("rect", {
        class: "bar",
        y: y + 24,
        width: `${(100 * rows) / most}%`,
        height: 10,
        rx: 5,
      }),
    );
    picture.append(group);
  });
  byId("chart").replaceChildren(picture);
  byId("counts").tBodies[0].replaceChildren(
    ...counts.map(([label, rows]) => {
      const name = el("th", { scope: "row" }, capital(label));
      const cells = [rows.toLocaleString("en"), percent(share(rows))];
      return el("tr", {}, name, ...cells.map((cell) => el("td", { className: "number" }, cell)));
    }),
  );
}
