"""The page about runs: what they were, what they reached, what happened, and what they found."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from distft.config import redact
from distft.report.chart import Chart
from distft.report.charts import curves_of, spent_chart, time_lines_of
from distft.report.comparison import Row, differing_settings, flatten, results
from distft.report.confusion import confusion_chart
from distft.report.evaluations import MOST_SAMPLES, ShownClassifier, classifiers_of, samples_of
from distft.report.html import Content, cards, figures, folded, paragraph, section, table, text_of
from distft.report.recorded_run import RecordedRun
from distft.report.values import is_number
from distft.tracker.jsonl import BEGINS
from distft.tracker.number_format import duration, number

_PLACE_SELECT = (
    '<p><label>Along <select id="place"><option value="step">steps</option>'
    '<option value="tokens">tokens</option><option value="hours">hours of work</option></select></label></p>'
)


def runs_page(runs: Sequence[RecordedRun]) -> Content:
    """The page about one run or several."""
    names = short_names([run.directory for run in runs])
    charts: list[Chart] = []
    parts = [*_heads(runs, names)]
    if len(runs) > 1:
        different = map(_cells, differing_settings(runs))
        parts.append(section("Differences of the settings", table(("setting", *names), different)))
    parts.append(section("Results", table(("result", *names), map(_number_cells, results(runs)))))
    curves = curves_of(runs, names)
    if curves:
        parts.append(section("Curves", _PLACE_SELECT + _drawn(curves, charts)))
    else:
        parts.append(section("Curves", paragraph("No metrics are logged yet.")))
    for run, name in zip(runs, names, strict=True):
        parts += _found(run, "" if len(runs) == 1 else f" of {name}", charts)
    times = [spent_chart(runs, names), *time_lines_of(runs, names)]
    parts.append(section("Time", _drawn(times, charts)))
    for run, name in zip(runs, names, strict=True):
        suffix = "" if len(runs) == 1 else f" of {name}"
        parts.append(section(f"Data{suffix}", _data_table(run)))
        settings = [(key, text_of(value)) for key, value in flatten(redact(dict(run.settings))).items()]
        parts.append(folded(f"Settings{suffix}", table(("setting", "value"), settings)))
    return Content(title=", ".join(names), body="\n".join(parts), charts=charts)


def notes_on(run: RecordedRun) -> Iterator[str]:
    """What a report of this run lacks."""
    if not run.metrics:
        yield f"{run.directory} has logged no metrics yet"
    if run.num_unreadable:
        yield f"{run.directory}: {run.num_unreadable:,} lines are damaged and left out"


def short_names(directories: Sequence[Path]) -> list[str]:
    """The directories without what is common to all, which differ even if the same is given twice."""
    paths = [directory.resolve() for directory in directories]
    if len(paths) == 1:
        return [paths[0].name]
    common = 0
    while all(len(path.parts) > common + 1 for path in paths) and len({p.parts[common] for p in paths}) == 1:
        common += 1
    names = [str(Path(*path.parts[common:])) for path in paths]
    return [
        name if name not in names[:i] else f"{name} ({names[: i + 1].count(name)})"
        for i, name in enumerate(names)
    ]


def _drawn(charts: Sequence[Chart], drawn: list[Chart]) -> str:
    """Figures of the charts, which are added to those that are drawn."""
    shown = figures(charts, len(drawn))
    drawn += charts
    return shown


def _heads(runs: Sequence[RecordedRun], names: Sequence[str]) -> Iterable[str]:
    for run, name in zip(runs, names, strict=True):
        facts = {
            "state": run.state(),
            "step": f"{run.step:,}" + ("" if run.max_steps is None else f" of {run.max_steps:,}"),
            "starts": f"{run.num_starts}",
            "ranks": " → ".join(_changes(run, "world_size")) or "-",
            "engine": _kind(run.settings.get("engine")),
            "device": " → ".join(_changes(run, "device")) or "-",
            "model": _kind(run.settings.get("model")),
            "objective": _kind(run.settings.get("objective"), "causal_lm"),
            "last written": datetime.fromtimestamp(run.written_at).strftime("%Y-%m-%d %H:%M"),
        }
        best = run.best(run.main_metric)
        if best is not None:
            facts[f"best {run.main_metric}"] = f"{number(best[1])} at step {best[0]:,}"
        times = [line["time"] for line in run.events if is_number(line.get("time"))]
        if times:
            facts["from first to last event"] = duration(max(times) - min(times))
        notes = "".join(paragraph(note) for note in notes_on(run))
        yield section(name, cards(facts) + notes)


def _changes(run: RecordedRun, field: str) -> list[str]:
    """The values of a field of the starts, each once in a row."""
    found = [str(e[field]) for e in run.events if e["kind"] in BEGINS and field in e]
    return [value for index, value in enumerate(found) if index == 0 or value != found[index - 1]]


def _kind(part: Any, default: str = "transformer") -> str:
    return str(part.get("type", default)) if isinstance(part, dict) else "-"


def _found(run: RecordedRun, suffix: str, charts: list[Chart]) -> Iterator[str]:
    """Confusion and mistakes of classifiers, and generated texts."""
    for classifier in classifiers_of(run):
        of = f" of {classifier.stream}{suffix}" if classifier.stream else suffix
        shown = _drawn([confusion_chart(classifier)], charts) if classifier.confusion else ""
        yield section(f"Mistakes{of}", shown + _mistakes(classifier))
    samples = [(f"{sample.step:,}", sample.prompt, sample.text) for sample in samples_of(run)]
    if samples:
        note = ""
        if any(len(run.evaluations) > MOST_SAMPLES for _ in samples[:1]):
            note = paragraph(f"Of each prompt at most {MOST_SAMPLES} texts are shown.")
        shown = table(("step", "prompt", "generated text"), samples, wide=(2,))
        yield section(f"Generated texts{suffix}", note + shown)


def _mistakes(found: ShownClassifier) -> str:
    intro = paragraph(
        f"At step {found.step:,}, {found.num_wrong:,} of {found.num_rows:,} rows are wrong"
        + (". The surest of them, with the text as the model reads it:" if found.mistakes else ".")
    )
    rows = [(f"{m.row:,}", m.label, m.predicted, f"{m.probability:.3f}", m.text) for m in found.mistakes]
    heads = ("row", "label", "predicted", "probability", "text")
    return intro + (table(heads, rows, wide=(4,)) if rows else "")


def _data_table(run: RecordedRun) -> str:
    lines = {(str(e.get("use")), str(e.get("summary"))): None for e in run.events if e["kind"] == "data"}
    epochs = run.values("epoch")
    note = paragraph(f"The training data were used {number(float(epochs[-1][1]))} times.") if epochs else ""
    return note + table(("use", "what it has"), list(lines), wide=(1,))


def _cells(row: Row) -> tuple[str, ...]:
    return (row.name, *map(text_of, row.values))


def _number_cells(row: Row) -> tuple[str, ...]:
    return (row.name, *("-" if value is None else number(value) for value in row.values))
