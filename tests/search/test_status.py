"""`distft tune status` tells what a search's files say, whether it is being run, and what is damaged."""

import json
from pathlib import Path
from typing import Any

import pytest

from distft.cli.main import main
from distft.cluster.tune import driver
from distft.errors import ConfigError
from distft.search.journal import JOURNAL_FILE, TrialRecord
from distft.search.lock import is_being_run, only_search
from distft.search.ranking import Ranked, best_of
from distft.search.settings import SearchConfig
from distft.search.status import read_status

SEARCH = {
    "kind": "search",
    "version": 1,
    "search": {"space": {"optim.peak_lr": [0.1, 0.2]}, "num_trials": 2},
    "base": {},
}
RUNNING: list[dict[str, Any]] = [
    SEARCH,
    {"kind": "trial", "number": 0, "values": {"optim.peak_lr": 0.1}},
    {"kind": "trial", "number": 1, "values": {"optim.peak_lr": 0.2}},
    {"kind": "start", "number": 0},
]
ENDED = [{"kind": "end", "number": number, "state": "failed"} for number in (0, 1)]


def _write(directory: Path, lines: list[dict[str, Any]]) -> None:
    (directory / JOURNAL_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_search_is_stopped_unless_a_process_has_its_lock_or_all_trials_have_ended(tmp_path: Path) -> None:
    _write(tmp_path, RUNNING)
    with only_search(tmp_path):
        assert is_being_run(tmp_path)
        running = read_status(tmp_path)
        with pytest.raises(ConfigError, match="Another"), only_search(tmp_path):
            pass
    stopped = read_status(tmp_path)
    assert running.summary == f"{tmp_path}: 1 running, 1 waiting of 2 trials"
    assert stopped.summary == (
        f"{tmp_path}: 2 waiting of 2 trials; stopped: the same `distft tune` command goes on"
    )
    _write(tmp_path, RUNNING + ENDED)
    assert read_status(tmp_path).summary == f"{tmp_path}: 2 failed of 2 trials"


@pytest.mark.parametrize(("state", "exit_code"), [("completed", 0), ("failed", 1)])
def test_the_exit_code_says_whether_there_is_a_best_trial(
    state: str, exit_code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trial = TrialRecord(0, {}, state=state)
    row = Ranked(trial, 0.5, None, 1, ())
    search = SearchConfig.model_validate(SEARCH["search"])
    found = driver.Outcome(tmp_path, search, None, [row], best_of([row]), [row.trial])
    monkeypatch.setattr(driver, "run_search", lambda *_, **__: found)
    assert main(["tune", "search.yaml"]) == exit_code
    assert main(["tune", "search.yaml", "--json"]) == exit_code


def test_the_best_is_one_of_those_that_were_repeated() -> None:
    lucky, repeated, worse = (TrialRecord(number, {}, state="completed") for number in range(3))
    rows = [
        Ranked(lucky, 0.60, None, 1, ()),
        Ranked(repeated, 0.59, 0.02, 3, ()),
        Ranked(worse, 0.57, 0.01, 3, ()),
    ]
    best, alone = best_of(rows), best_of(rows[:1])
    assert best is not None
    assert alone is not None
    assert (best.trial, alone.trial) == (repeated, lucky)
    assert best_of([]) is None


def test_what_is_damaged_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = {"kind": "result", "number": 0, "run": "run", "run_dir": "a", "metrics": {"f1": "x"}}
    _write(tmp_path, [*RUNNING, damaged])
    assert main(["tune", "status", str(tmp_path)]) == 0
    assert "search.jsonl: 1 line is damaged and left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("empty", "search.jsonl is empty"), ("none", "has no search.jsonl"), ("folder", "cannot be read: Is a")],
)
def test_a_directory_without_a_search_is_refused(name: str, message: str, tmp_path: Path) -> None:
    if name == "empty":
        (tmp_path / JOURNAL_FILE).touch()
    elif name == "folder":
        (tmp_path / JOURNAL_FILE).mkdir()
    with pytest.raises(ConfigError, match=message):
        read_status(tmp_path)


def test_a_trial_whose_metrics_are_a_folder_is_told(tmp_path: Path) -> None:
    _write(tmp_path, RUNNING)
    (tmp_path / "trials/00000/metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be read: Is a directory"):
        read_status(tmp_path)
