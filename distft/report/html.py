"""Parts of a page as HTML: everything that comes from a run is escaped here."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from distft.report.chart import Chart


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a page shows: `body` is HTML, in which chart `i` is drawn into the element `chart<i>`."""

    title: str
    body: str
    charts: Sequence[Chart]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, wide: Sequence[int] = ()) -> str:
    """A table that sorts by the column whose head is pressed; the columns `wide` have long texts."""
    head = "".join(
        f'<th aria-sort="none" scope="col"><button type="button">{escape(text)}</button></th>'
        for text in heads
    )
    body = "".join(f"<tr>{_cells(row, wide)}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cells(row: Sequence[str], wide: Sequence[int]) -> str:
    return "".join(
        f"<td{' class=wide' if column in wide else ''}>{escape(cell)}</td>" for column, cell in enumerate(row)
    )


def cards(facts: dict[str, str]) -> str:
    """Names with their values, side by side."""
    shown = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f"<dl class=cards>{shown}</dl>"


def section(title: str, content: str) -> str:
    """A part of the page with a heading; `content` is HTML."""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def folded(title: str, content: str) -> str:
    """A part of the page that opens when its title is pressed; `content` is HTML."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def figures(charts: Sequence[Chart], first: int) -> str:
    """Charts, of which the page has drawn `first` before."""
    shown = "".join(
        f"<figure{' class=broad' if chart.is_broad else ''}><figcaption>{escape(chart.title)}</figcaption>"
        f'<div class="chart" id="chart{number}"></div></figure>'
        for number, chart in enumerate(charts, start=first)
    )
    return f'<div class="figures">{shown}</div>'


def text_of(value: Any) -> str:
    """A setting as it is read: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
