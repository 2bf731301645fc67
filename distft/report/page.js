/* Draws the charts of a report, and sorts its tables. */
"use strict";
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const titles = { step: "step", tokens: "tokens", hours: "hours of work" };
const place = document.getElementById("place");

async function draw(index) {
  const chart = charts[index];
  const spec = structuredClone(chart.spec);
  if (chart.hasSteps) {
    spec.encoding.x.field = place.value;
    spec.encoding.x.title = titles[place.value];
  }
  Object.assign(spec, { width: "container", background: "transparent", autosize: { type: "fit", contains: "padding" } });
  if (!("height" in spec)) spec.height = 230;
  const actions = { export: true, source: false, compiled: false, editor: false };
  await window.vegaEmbed(document.getElementById("chart" + index), spec, {
    actions, renderer: "svg", theme: dark.matches ? "dark" : undefined, downloadFileName: "chart" + index,
  });
}

async function drawAll() {
  for (let index = 0; index < charts.length; index += 1) await draw(index);
  document.body.dataset.drawn = "yes";
}

function key(cell) {
  const number = Number(cell.textContent.replaceAll(",", ""));
  return Number.isNaN(number) || cell.textContent === "" ? null : number;
}

function sort(head) {
  const table = head.closest("table");
  const column = [...head.parentNode.children].indexOf(head);
  const up = head.dataset.up !== "yes";
  head.dataset.up = up ? "yes" : "no";
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [a.cells[column], b.cells[column]];
    const [i, j] = [key(x), key(y)];
    const order = i !== null && j !== null ? i - j : x.textContent.localeCompare(y.textContent);
    return up ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

for (const head of document.querySelectorAll("th")) head.addEventListener("click", () => sort(head));
place.addEventListener("change", drawAll);
dark.addEventListener("change", drawAll);
drawAll();
