/* Draws the charts of a report, sorts its tables, and follows the server of a live report. */
"use strict";
const titles = { step: "step", tokens: "tokens", hours: "hours of work" };
const ink = "currentColor";
const soft = "#8885";
// The colours of the page, whatever they are: a chart need not be drawn again for a dark screen or for paper.
const looks = {
  axis: { labelColor: ink, titleColor: ink, gridColor: soft, domainColor: soft, tickColor: soft },
  legend: { labelColor: ink, titleColor: ink },
  title: { color: ink },
  header: { labelColor: ink, titleColor: ink },
  view: { stroke: soft },
};
let along = "step";
const sorted = new Map(); // by number of the table: the column, and whether it rises

async function draw(index) {
  const chart = charts[index];
  const spec = structuredClone(chart.spec);
  if (chart.hasSteps) {
    spec.encoding.x.field = along;
    spec.encoding.x.title = titles[along];
  }
  Object.assign(spec, { width: "container", background: "transparent", autosize: { type: "fit-x", contains: "padding" } });
  if (!("height" in spec)) spec.height = 180; // of the plot alone, without axes and legend
  const actions = { export: true, source: false, compiled: false, editor: false };
  await window.vegaEmbed(document.getElementById("chart" + index), spec, {
    actions, config: looks, renderer: "svg", downloadFileName: "chart" + index,
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

function sort(table, column, rises) {
  for (const [at, head] of [...table.tHead.rows[0].cells].entries())
    head.ariaSort = at !== column ? "none" : rises ? "ascending" : "descending";
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [a.cells[column], b.cells[column]];
    const [i, j] = [key(x), key(y)];
    // Numbers come before texts, in whichever direction.
    if ((i === null) !== (j === null)) return i === null ? 1 : -1;
    const order = i !== null ? i - j : x.textContent.localeCompare(y.textContent);
    return rises ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

function enliven() {
  for (const [number, table] of [...document.querySelectorAll("table")].entries()) {
    for (const [column, head] of [...table.tHead.rows[0].cells].entries())
      head.firstChild.addEventListener("click", () => {
        const rises = head.ariaSort !== "ascending";
        sorted.set(number, [column, rises]);
        sort(table, column, rises);
      });
    const [column, rises] = sorted.get(number) ?? [null, true];
    if (column !== null && column < table.tHead.rows[0].cells.length) sort(table, column, rises);
  }
  const place = document.getElementById("place");
  if (place === null) return;
  place.value = along;
  place.addEventListener("change", () => { along = place.value; drawAll(); });
}

async function follow() {
  try {
    const reply = await fetch("update?version=" + encodeURIComponent(version));
    if (!reply.ok) throw new Error(reply.statusText);
    const update = await reply.json();
    document.getElementById("written").textContent = update.note;
    if (update.version !== version) {
      const open = [...document.querySelectorAll("details")].map((part) => part.open);
      document.getElementById("main").innerHTML = update.body;
      for (const [at, part] of document.querySelectorAll("details").entries()) part.open = open[at] ?? false;
      [version, charts] = [update.version, update.charts];
      enliven();
      await drawAll();
    }
  } catch (error) {
    document.getElementById("written").textContent = "The server does not answer: this is its last state.";
  }
  setTimeout(follow, 2000);
}

enliven();
drawAll();
if (version !== null) follow();
