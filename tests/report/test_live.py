"""`distft watch` tells what the run's files say, from before its first line to its end."""

import io
import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from distft.cli.main import main
from distft.report.live import LiveState, panel_of, plain_line, seconds_left, sparkline
from distft.report.recorded_run import RecordedRun


def _write(
    folder: Path, metrics: Sequence[object], events: Sequence[object], **settings: object
) -> RecordedRun:
    folder.mkdir(exist_ok=True)
    for name, lines in (("metrics", metrics), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(json.dumps(settings))
    return RecordedRun.read(folder)


def test_time_left_is_that_of_the_last_start(tmp_path: Path) -> None:
    metrics: list[dict[str, float]] = [{"step": s, "time": 100.0 + s, "loss": 1.0} for s in range(1, 11)]
    metrics += [{"step": s, "time": 900.0 + 2 * s, "loss": 1.0} for s in range(11, 21)]
    events = [{"kind": "start", "time": 100.0}, {"kind": "resume", "time": 910.0}]
    assert seconds_left(_write(tmp_path / "a", metrics, events, train={"max_steps": 50})) == 60.0
    assert seconds_left(_write(tmp_path / "b", metrics[:1], events, train={"max_steps": 50})) is None
    assert seconds_left(_write(tmp_path / "c", metrics, events, train={"num_epochs": 2})) is None
    half_way = [{**line, "epoch": line["step"] / 20} for line in metrics]
    assert seconds_left(_write(tmp_path / "d", half_way, events, train={"num_epochs": 2.5})) == 60.0


def test_a_sparkline_rises_with_its_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(list(range(800)), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0, 3.0], 9) == "▁▁"
    assert sparkline([], 9) == ""


def test_a_panel_has_facts_curve_and_events_and_no_control_characters(runs: Path, tmp_path: Path) -> None:
    hostile = {"kind": "note\x1b[2J", "time": 1e9, "note": "[bold]\x1b]0;x\x07"}
    _write(
        tmp_path / "run", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], [{"kind": "start"}, hostile]
    )
    console = Console(width=80, record=True, file=io.StringIO())
    for folder in (runs / "first", tmp_path / "run"):
        console.print(panel_of(LiveState(directory=folder, run=RecordedRun.read(folder), now_s=2e9), 80))
    shown = console.export_text()
    assert "validation/loss" in shown
    assert "12 of 12" in shown
    assert "█" in shown
    assert "[bold]" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


def test_a_line_has_no_control_characters(tmp_path: Path) -> None:
    status = "done\x1b]0;x\x07\nstate completed\u202e"
    run = _write(tmp_path / "run", [], [{"kind": "start"}, {"kind": "finish", "status": status}])
    shown = plain_line(LiveState(directory=tmp_path, run=run, now_s=2e9))
    assert shown.startswith(r"state done\x1b]0;x\x07\nstate completed\u202e | ")


def test_a_run_that_begins_and_ends_while_it_is_watched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"

    def begin_and_end() -> None:
        time.sleep(0.3)
        _write(folder, [], [{"kind": "start", "time": time.time()}], train={"max_steps": 4})
        time.sleep(0.5)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "loss": 0.25}\n')
        with (folder / "events.jsonl").open("a") as file:
            file.write('{"kind": "finish", "status": "completed", "step": 4}\n')

    thread = threading.Thread(target=begin_and_end)
    thread.start()
    assert main(["watch", str(folder), "--interval", "0.1", "--wait", "60"]) == 0
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "state waiting for the run to begin"
    assert lines[-1] == "state completed | step 4 of 4 | loss 0.25"
    assert len(lines) == len(set(lines))


def test_a_run_that_does_not_begin_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path), "--interval", "0.1", "--wait", "0"]) == 2
    assert "is no run: it has no events.jsonl" in capsys.readouterr().err


def test_q_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    _write(tmp_path / "run", [{"step": 1, "loss": 1.5}], [{"kind": "start", "time": time.time()}])
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "distft", "watch", str(tmp_path / "run"), "--interval", "60"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while b"leave" not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, b"q")
        assert process.wait(timeout=60) == 0
    os.close(ours)
    assert b"1.5" in shown
