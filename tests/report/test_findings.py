"""Confusion, mistakes and texts on the page are those of the run's evaluations; damaged ones are left out."""

import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from distft.cli.main import main
from distft.report.charts import time_lines_of
from distft.report.confusion import confusion_chart
from distft.report.evaluations import MOST_SAMPLES, classifiers_of, samples_of
from distft.report.page import content_of, page_of
from distft.report.recorded_run import FollowedRun, RecordedRun
from distft.report.run_page import runs_page


def test_the_evaluation_that_was_best_is_shown(findings: Path) -> None:
    run = RecordedRun.read(findings / "classifier")
    (found,) = classifiers_of(run)
    best = run.best("validation/accuracy")
    assert best is not None
    assert found.step == best[0]
    right = sum(found.confusion[i][i] for i in range(len(found.labels)))
    assert right / found.num_rows == pytest.approx(best[1])
    assert found.num_rows - right == found.num_wrong
    cells = confusion_chart(found).spec["data"]["values"]
    assert sum(cell["rows"] for cell in cells) == found.num_rows
    body = runs_page([run]).body
    assert all(mistake.text in body for mistake in found.mistakes)
    assert len(found.mistakes) == min(found.num_wrong, 20)


def test_the_length_of_epochs_is_known_in_steps(findings: Path) -> None:
    run = RecordedRun.read(findings / "classifier")
    assert run.settings["train"]["max_steps"] is None
    assert run.max_steps == run.step == 12


def test_texts_stand_by_prompt_and_step(findings: Path) -> None:
    run = RecordedRun.read(findings / "lm")
    assert [(sample.step, sample.prompt) for sample in samples_of(run)] == [(6, "the cat"), (12, "the cat")]
    assert "Generated texts" in runs_page([run]).body


def test_of_many_texts_the_first_and_the_last_are_shown(findings: Path, tmp_path: Path) -> None:
    shutil.copytree(findings / "lm", tmp_path / "run")
    lines = [{"step": step, "samples": [{"prompt": "a", "text": str(step)}]} for step in range(1001)]
    (tmp_path / "run/evaluations.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    shown = [sample.step for sample in samples_of(RecordedRun.read(tmp_path / "run"))]
    assert (shown[0], shown[-1]) == (0, 1000)
    assert len(shown) <= MOST_SAMPLES + 1
    assert shown == sorted(set(shown))


def test_stalls_skips_and_pauses_are_on_the_time_line(tmp_path: Path) -> None:
    events = [
        {"time": 1000.0, "kind": "start", "step": 0},
        {"time": 1050.0, "kind": "save", "step": 5, "stall_s": 2.0, "write_s": 8.0},
        {"time": 2000.0, "kind": "resume", "step": 5},
        {"time": 2010.0, "kind": "straggler", "rank": 3},
    ]
    metrics = [
        {"step": 1, "time": 1010.0, "skipped_steps": 0},
        {"step": 2, "time": 1020.0, "skipped_steps": 2},
    ]
    for name, lines in (("events", events), ("metrics", metrics)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (chart,) = time_lines_of([RecordedRun.read(tmp_path)], ["a"])
    spans = {row["event"]: (row["time"] / 1000, row["until"] / 1000) for row in chart.spec["data"]["values"]}
    assert spans == {
        "start": (1000, 1000),
        "save": (1042, 1050),
        "resume": (2000, 2000),
        "straggler": (2010, 2010),
        "stall of a save": (1040, 1042),
        "skipped steps": (1020, 1020),
        "not running": (1050, 2000),
    }


def test_damaged_lines_are_left_out_and_told(
    findings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(findings / "classifier", folder)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(
            b'\xff\xfe\n[1]\n{"step": 99, "loss": NaN, "validation/accuracy": 1e999}\n{"step": 100, "lo'
        )
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 3, "classifiers": [{"num_rows": 1}], "samples": 3}\n')
        file.write('{"step": 3, "classifiers": [{"num_rows": 1, "num_wrong": 1, "labels": ["\\ud800"], ')
        file.write(
            '"confusion": [[-1]], "mistakes": [{}, 3, {"row": 1, "probability": 0.5, "text": "\\ud800"}]}]}\n'
        )
    assert main(["report", str(folder), "-o", str(tmp_path / "report.html")]) == 0
    assert f"note: {folder}: 2 lines are damaged and left out" in capsys.readouterr().err
    assert b"2 lines are damaged and left out" in (tmp_path / "report.html").read_bytes()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = ("step", "time", "kind", "classifiers", "samples", "loss", "skipped_steps", "stall_s", "step_s")


@given(lines=st.lists(st.dictionaries(st.sampled_from(_FIELDS), _JSON), max_size=6), kind=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lines_have_a_page(tmp_path: Path, lines: list[dict[str, Any]], kind: bool) -> None:
    given_lines = [{**line, "kind": "save"} if kind else line for line in lines]
    for name in ("metrics", "events", "evaluations"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in given_lines))
    page_of(content_of([tmp_path, tmp_path])[0])


def test_a_run_that_grows_is_read_on_and_one_that_resumed_anew(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"kind": "start"}\n')
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    followed = FollowedRun(tmp_path)
    assert [line["step"] for line in RecordedRun.of(followed).metrics] == [1, 2]
    with metrics.open("a") as file:
        file.write('p": 3}\n')
    assert [line["step"] for line in RecordedRun.of(followed).metrics] == [1, 2, 3]
    replaced = tmp_path / "new"
    replaced.write_text('{"step": 1}\n{"step": 7}\n{"step": 8}\n{"step": 9}\n')
    replaced.replace(metrics)
    assert [line["step"] for line in RecordedRun.of(followed).metrics] == [1, 7, 8, 9]
