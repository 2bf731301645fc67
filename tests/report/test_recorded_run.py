"""A run is read from its files as it is, and from damaged ones without harm."""

import json
import os
import shutil
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from support.small_runs import logged, pretraining, run_until_power_cut

from distft.cli.main import main
from distft.errors import ConfigError
from distft.report.comparison import differing_settings, results
from distft.report.recorded_run import RecordedRun, find_runs


def test_a_run_is_found_with_its_steps_state_and_best_value(runs: Path) -> None:
    assert list(find_runs(runs)) == [runs / "deeper/second", runs / "first"]
    found = RecordedRun.read(runs / "first")
    assert (found.step, found.max_steps, found.num_starts, found.state()) == (12, 12, 1, "completed")
    losses = logged(runs / "first", "validation/loss")
    assert found.values("validation/loss") == list(losses.items())
    assert found.best("validation/loss") == min(losses.items(), key=lambda pair: pair[1])
    assert found.main_metric == "validation/loss"
    accuracies = logged(runs / "first", "validation/accuracy")
    assert found.best("validation/accuracy") == max(accuracies.items(), key=lambda pair: pair[1])


def test_a_run_without_an_end_is_running_until_it_was_silent_too_long(runs: Path, tmp_path: Path) -> None:
    raw = pretraining(runs.parent / "data", tmp_path / "run", hang_timeout_s=60)
    run_until_power_cut(raw, 5)
    events = tmp_path / "run/events.jsonl"
    lines = [line for line in events.read_text().splitlines() if json.loads(line)["kind"] != "finish"]
    events.write_text("\n".join(lines) + "\n")  # as if the machine had lost its power
    found = RecordedRun.read(tmp_path / "run")
    assert found.state(found.written_at + 59) == "running"
    assert found.state(found.written_at + 61) == "silent"


def test_only_what_differs_is_compared(runs: Path) -> None:
    first, second = (RecordedRun.read(runs / name) for name in ("first", "deeper/second"))
    assert [(row.name, row.values) for row in differing_settings([first, second])] == [
        ("optim.peak_lr", (0.01, 0.02))
    ]
    reached = {row.name: row.values for row in results([first, second])}
    assert reached["step"] == (12, 12)
    assert reached["loss"] == tuple(logged(runs / name)[12] for name in ("first", "deeper/second"))
    assert differing_settings([first, first]) == []


def test_commands_print_tables_and_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["run", "state", "step", "metric", "best", "written"]
    assert {line.split()[0] for line in printed[1:]} == {"first", "deeper/second"}
    assert main(["runs", str(runs), "--metric", "loss", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["run"]: row["value"] for row in rows}["first"] == min(logged(runs / "first").values())
    assert main(["compare", str(runs / "first"), str(runs / "deeper/second"), "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)
    assert tables["settings"] == {"optim.peak_lr": [0.01, 0.02]}
    assert main(["compare", str(runs / "first"), str(runs / "deeper/second")]) == 0
    assert "optim.peak_lr  0.01" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs", "{nowhere}"], "is no directory. Give one that has runs in it."),
        (["runs", "{empty}"], "No run has begun in"),
        (
            ["runs", "{runs}", "--metric", "validation/f2"],
            "no run has logged it; there are data_wait_s, epoch, ",
        ),
        (["compare", "{runs}/first"], "One run has nothing to be compared with"),
        (["compare", "{runs}/first", "{empty}"], "is no run: it has no events.jsonl"),
    ],
)
def test_mistakes_are_told(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    names = {"nowhere": tmp_path / "nowhere", "empty": tmp_path, "runs": runs}
    assert main([argument.format(**names) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "evaluations.jsonl", "config.yaml"])
def test_a_folder_in_place_of_a_file_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "events.jsonl").write_text('{"kind": "start", "time": 1.0}\n')
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    for command in (
        ["compare", str(tmp_path), str(tmp_path)],
        ["report", str(tmp_path), "-o", str(tmp_path / "report.html")],
        ["watch", str(tmp_path), "--wait", "0"],
    ):
        assert main(command) == 2
        assert f"{name}" in capsys.readouterr().err


def test_a_table_has_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a\x1b[2J\u202e"
    folder.mkdir()
    finish = {"kind": "finish", "status": "done\x1b]0;x\x07\nstate \x9b2J"}
    (folder / "events.jsonl").write_text(f'{{"kind": "start"}}\n{json.dumps(finish)}\n')
    (folder / "config.yaml").write_text('"k\\e[2J": "v\\u202e"')
    other = tmp_path / "other"
    other.mkdir()
    (other / "events.jsonl").write_text('{"kind": "start"}\n')
    assert main(["runs", str(tmp_path)]) == 0
    assert main(["compare", str(folder), str(other)]) == 0
    shown = capsys.readouterr().out
    assert r"done\x1b]0;x\x07\nstate \x9b2J" in shown
    assert r"k\x1b[2J" in shown
    assert not set(shown) & set("\x1b\x07\x9b\u202e")


def test_a_damaged_run_is_left_out_with_its_reason(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "first", tmp_path / "good")
    shutil.copytree(runs / "first", tmp_path / "bad")
    (tmp_path / "bad/config.yaml").write_text("a: [")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert main(["runs", str(tmp_path)]) == 0
    streams = capsys.readouterr()
    assert "good" in streams.out
    assert "bad" not in streams.out
    assert f"note: {tmp_path / 'bad'} left out: " in streams.err


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_LINES = st.lists(
    st.dictionaries(st.sampled_from(["step", "time", "kind", "status", "loss", "validation/loss"]), _JSON),
    max_size=5,
)


@given(metrics=_LINES, events=_LINES, train=_JSON, silence=_JSON)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lines_are_read(
    tmp_path: Path, metrics: list[dict[str, object]], events: list[object], train: object, silence: object
) -> None:
    for name, lines in (("metrics.jsonl", metrics), ("events.jsonl", events)):
        (tmp_path / name).write_text("\n".join([*map(json.dumps, lines), "not JSON", "[1]"]))
    (tmp_path / "config.yaml").write_text(json.dumps({"train": train, "hang_timeout_s": silence}))
    os.utime(tmp_path / "events.jsonl")
    try:
        found = RecordedRun.read(tmp_path)
    except ConfigError:
        return  # of a number that YAML reads otherwise
    assert isinstance(found.state(), str)
    assert all(step in {line.get("step") for line in metrics} for step, _ in found.values(found.main_metric))
    results([found, found])
    differing_settings([found, found])
