"""A browser draws every chart of a report, no text over another, and sorts its tables."""

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from support.browser import CHROMIUM, dom_of

from distft.report.page import content_of, page_of

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
# Waits for the charts, then tells what overlaps and how the first table sorts, in an attribute of the page.
LOOK = """<script>
function boxes(chart) {
  return [...chart.querySelectorAll("svg.marks text")]
    .filter((text) => text.textContent.trim())
    .filter((text) => !(text.getAttribute("transform") ?? "").includes("rotate"))
    .filter((text) => getComputedStyle(text).opacity !== "0" && text.style.display !== "none")
    .map((text) => [text.textContent, text.getBoundingClientRect()]);
}
function meet(a, b) {
  const width = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  return width > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
}
function look() {
  if (document.body.dataset.drawn !== "yes") { setTimeout(look, 100); return; }
  const overlaps = [], outside = [];
  for (const figure of document.querySelectorAll("figure")) {
    const found = boxes(figure), frame = figure.getBoundingClientRect();
    for (const [i, [text, box]] of found.entries()) {
      if (box.left < frame.left - 1 || box.right > frame.right + 1) outside.push(text);
      for (const [other, otherBox] of found.slice(i + 1))
        if (meet(box, otherBox)) overlaps.push([text, other]);
    }
  }
  const table = document.querySelector("table"), button = table.querySelector("button");
  const first = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
  button.focus();
  button.click();
  const rising = first();
  button.click();
  document.body.dataset.found = JSON.stringify({
    overlaps, outside, rising, falling: first(), sort: table.querySelector("th").ariaSort,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    saves: document.querySelectorAll('a[download]').length,
    drawn: document.querySelectorAll("svg.marks").length,
    titles: [...document.querySelectorAll("svg.marks")].map(
      (svg) => svg.querySelectorAll(".role-axis-title text").length),
  });
}
look();
</script></body>"""


def _found(directories: list[Path], tmp_path: Path, width: int) -> tuple[dict[str, Any], int]:
    content = content_of(directories)[0]
    path = tmp_path / "report.html"
    page, _, end = page_of(content).decode().rpartition("</body>")
    path.write_text(page + LOOK + end)
    shown = dom_of(path.as_uri(), tmp_path / "profile", width=width)
    found = re.search(r'data-found="([^"]*)"', shown)
    assert found is not None, "all charts are drawn"
    return json.loads(unescape(found[1])), len(content.charts)


@pytest.mark.parametrize("width", [500, 1280])
def test_runs_look_right(findings: Path, tmp_path: Path, width: int) -> None:
    found, num_charts = _found([findings / "classifier", findings / "lm"], tmp_path, width)
    assert found["drawn"] == num_charts > 8
    assert (found["overlaps"], found["outside"], found["wide"]) == ([], [], 0)
    assert found["saves"] >= num_charts, "each chart can be saved"
    assert all(found["titles"]), "axes have titles"
    assert found["rising"] == sorted(found["rising"])
    assert found["falling"] == found["rising"][::-1]
    assert found["sort"] == "descending"


def test_a_search_looks_right(search: Path, tmp_path: Path) -> None:
    found, num_charts = _found([search], tmp_path, 1000)
    assert found["drawn"] == num_charts == 4
    assert (found["overlaps"], found["outside"], found["wide"]) == ([], [], 0)
