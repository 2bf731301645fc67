"""A report is one file that needs nothing else, and shows every run's numbers, whatever their names are."""

import json
import re
import shutil
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distft.cli.main import main
from distft.report.page import MAX_BYTES, content_of, page_of
from distft.report.recorded_run import RecordedRun
from distft.report.series import MAX_POINTS, curve_rows, pauses, places_of, time_spent


class _Elements(HTMLParser):
    """The text of each kind of element, and the URLs of all."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.urls: list[str] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self.urls += [str(value) for name, value in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)


def _page(*directories: Path) -> str:
    return page_of(content_of(directories)[0]).decode()


def _charts(page: str) -> list[dict]:  # type: ignore[type-arg]
    found = re.search(r"<script>let charts = (.*?); let version = null;</script>", page)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


def _run(folder: Path, metrics: Sequence[object], events: Sequence[object]) -> RecordedRun:
    for name, lines in (("metrics", metrics), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RecordedRun.read(folder)


def test_every_logged_value_is_in_a_curve(runs: Path) -> None:
    found = [RecordedRun.read(runs / name) for name in ("first", "deeper/second")]
    page = _page(runs / "first", runs / "deeper/second")
    charts = {
        chart["spec"]["encoding"]["y"].get("title"): chart for chart in _charts(page) if chart["hasSteps"]
    }
    drawn = {(row["run"], row["step"]): row["value"] for row in charts["nats"]["spec"]["data"]["values"]}
    for name, run in zip(("first", "deeper/second"), found, strict=True):
        assert {step: value for (of, step), value in drawn.items() if of == name} == dict(run.values("loss"))
    elements = _Elements(page)
    assert elements.urls == []
    assert {"first", "deeper/second"} <= set(elements.texts["button"])
    assert "optim.peak_lr" in elements.texts["td"]


def test_no_text_of_a_run_becomes_a_part_of_the_page(runs: Path, tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>'\"${title}"
    folder = tmp_path / "<b>bold' && true || '"
    shutil.copytree(runs / "first", folder)
    (folder / "config.yaml").write_text(json.dumps({"note": hostile, hostile: 1}))
    lines = (
        (folder / "metrics.jsonl").read_text() + json.dumps({"step": 12, f"validation/{hostile}": 1.0}) + "\n"
    )
    (folder / "metrics.jsonl").write_text(lines)
    event = {"time": 1.0, "kind": "data", "use": hostile, "summary": hostile}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n" + (folder / "events.jsonl").read_text())
    plain, page = _Elements(_page(runs / "first")), _page(folder)
    elements = _Elements(page)
    assert "img" not in elements.texts
    assert elements.urls == []
    assert len(elements.texts["script"]) == len(plain.texts["script"])
    assert hostile in "".join(elements.texts["td"])
    assert _charts(page)


def test_a_long_curve_keeps_its_spikes_and_becomes_short(tmp_path: Path) -> None:
    values = [1.0] * 5000
    values[1234], values[4321] = 99.0, -99.0
    metrics = [{"step": step, "loss": value} for step, value in enumerate(values)]
    run = _run(tmp_path, metrics, [{"kind": "start"}])
    rows = curve_rows(run, "a", "loss", places_of(run))
    assert len(rows) <= MAX_POINTS + 2
    assert {(row["step"], row["value"]) for row in rows} >= {(1234, 99.0), (4321, -99.0)}
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_time_in_which_no_start_was_there_is_no_work(tmp_path: Path) -> None:
    events = [
        {"time": 0.0, "kind": "start", "step": 0},
        {"time": 100.0, "kind": "save", "step": 10, "stall_s": 5.0},
        {"time": 1100.0, "kind": "resume", "step": 10},
        {"time": 1200.0, "kind": "finish", "status": "completed", "step": 20},
    ]
    metrics = [
        {"step": 10, "time": 100.0, "loss": 2.0, "step_s": 9.0, "data_wait_s": 1.0},
        {"step": 20, "time": 1200.0, "loss": 1.0, "step_s": 8.0, "data_wait_s": 2.0},
    ]
    run = _run(tmp_path, metrics, events)
    assert pauses(run) == [(100.0, 1100.0)]
    assert [row["hours"] for row in curve_rows(run, "a", "loss", places_of(run))] == [
        0.0,
        round(100 / 3600, 5),
    ]
    spent = {"steps": 140.0, "waiting for data": 30.0, "waiting for saves": 5.0, "not running": 1000.0}
    assert time_spent(run) == {**spent, "other": pytest.approx(25.0)}


def test_a_run_that_is_given_twice_is_shown_once(runs: Path) -> None:
    first = runs / "first"
    content, notes = content_of([first, first / "."])
    assert notes[0] == f"{first} was given twice, and is shown once."
    assert content.body == content_of([first])[0].body


def test_the_command_writes_the_file_and_tells_what_is_missing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.html"
    assert main(["report", str(runs / "first"), "-o", str(output)]) == 0
    assert output.stat().st_size < MAX_BYTES
    starting = tmp_path / "starting"
    starting.mkdir()
    (starting / "events.jsonl").write_text('{"kind": "start", "time": 1.0}\n')
    assert main(["report", str(starting), "-o", str(output)]) == 0
    assert f"note: {starting} has logged no metrics yet" in capsys.readouterr().err
    output.write_text("mine")
    for path in (output, tmp_path):
        assert main(["report", str(runs / "first"), "-o", str(path)]) == 2
        assert "exists, and is no report of distft" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert main(["report", str(runs / "first"), "-o", str(tmp_path / "none/page.html")]) == 2
    assert "none is no directory: make it" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "other.html")]) == 2
    assert "is no run" in capsys.readouterr().err
