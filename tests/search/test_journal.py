"""The journal of a search: whatever is repeated, torn or missing in it, each value counts once."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.errors import ConfigError
from distft.search.journal import JOURNAL_FILE, Journal, mean_and_spread, read_journal, trials_of
from distft.search.metrics import MetricSeries, main_metric
from distft.search.ranking import best_of, ranked
from distft.search.settings import ConstraintConfig, SearchConfig
from distft.tracker.growing_lines import GrowingLines

Line = dict[str, Any]


def result(number: int, step: int | None, value: float | None, **more: Any) -> Line:
    base = {"kind": "result", "number": number, "run": "run", "run_dir": f"trials/{number}"}
    return {**base, "step": step, "value": value, "metric": "validation/accuracy", **more}


def trial(number: int, **values: Any) -> Line:
    return {"kind": "trial", "number": number, "values": values}


def end(number: int, state: str = "completed", **more: Any) -> Line:
    return {"kind": "end", "number": number, "state": state, **more}


LINES: list[Line] = [
    trial(0, rate=0.1),
    trial(1, rate=0.2),
    {"kind": "start", "number": 0, "time": 1.0},
    result(0, 10, 0.5, total_step=10, seconds=3.0),
    result(0, 20, 0.6, total_step=20, seconds=5.0),
    end(0),
    {"kind": "start", "number": 1, "time": 2.0},
    result(1, 10, 0.7, total_step=10, seconds=2.0),
]


@given(st.lists(st.sampled_from(range(len(LINES))), max_size=8))
def test_lines_that_are_told_again_change_nothing(again: list[int]) -> None:
    told = LINES + [LINES[index] for index in sorted(again) if LINES[index]["kind"] in {"trial", "result"}]
    once, twice = trials_of(LINES), trials_of(told)
    assert {n: (t.values, t.history(), t.step) for n, t in once.items()} == {
        n: (t.values, t.history(), t.step) for n, t in twice.items()
    }


def test_time_adds_up_over_starts_and_is_not_counted_twice_within_one() -> None:
    again: list[Line] = [
        {"kind": "start", "number": 1, "time": 9.0},
        result(1, 20, 0.8, seconds=4.0),
        result(1, None, None, seconds=6.0),
    ]
    assert trials_of(LINES + again)[1].seconds == pytest.approx(8.0)


def test_a_torn_last_line_does_not_count_and_the_next_one_does(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append("search", version=1, search={}, base={})
    journal.append("trial", number=0, values={"rate": 1})
    journal.close()
    with (tmp_path / JOURNAL_FILE).open("a") as file:
        file.write('{"kind": "trial", "number": 1, "val')
    again = Journal(tmp_path)
    assert list(again.trials) == [0]
    again.append("trial", number=1, values={"rate": 2})
    again.close()
    assert [trial.values for trial in Journal(tmp_path).trials.values()] == [{"rate": 1}, {"rate": 2}]


def test_a_file_that_is_no_journal_or_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / JOURNAL_FILE
    path.write_text(json.dumps({"kind": "trial", "number": 0}) + "\n")
    with pytest.raises(ConfigError, match="no journal"):
        read_journal(tmp_path)
    path.write_text(json.dumps({"kind": "search", "version": 99}) + "\n")
    with pytest.raises(ConfigError, match="version 99"):
        read_journal(tmp_path)


SEARCH: Line = {
    "kind": "search",
    "version": 1,
    "search": {"space": {"optim.peak_lr": [0.1, 0.2]}, "num_trials": 2},
    "base": {},
}


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "trial", "number": 1},
        {"kind": "trial", "number": 1, "values": 3},
        {"kind": "trial", "number": True, "values": {}},
        {"kind": "trial", "number": 2, "values": {}},
        {"kind": "trial", "number": 1_000_000_000, "values": {}},
        {"kind": "trial", "number": 1_000_001, "values": {}, "repeat_of": 0},
        {"kind": "trial", "number": 1, "values": {}, "ranks": 0},
        {"kind": "trial", "number": 1, "values": {}, "repeat_of": "0"},
        {"kind": "start", "number": 1},
        {"kind": "end", "number": 0},
        {"kind": "end", "number": 0, "state": "running"},
        {"kind": "end", "number": 0, "state": ["completed"]},
        {"kind": "end", "number": 0, "state": "completed", "step": "9"},
        {"kind": "result", "number": 0, "run": "run"},
        {"kind": "result", "number": 0, "run": [], "run_dir": "a"},
        result(0, 5, 0.5, metrics=1),
        result(0, 5, 0.5, metrics={"validation/macro_f1": "x"}),
        result(0, 5, 0.5, violations="too large"),
        result(0, 5, 0.5, seconds=-1),
        result(0, 5, 10**400),
        result(0, True, 0.5),
        {**result(0, 5, 0.5), "value": "0.5"},
        {**result(0, 5, 0.5), "value": float("nan")},
        {"kind": "fork", "number": 0},
        {"kind": "hello", "number": 0},
        {"kind": [], "number": 0},
        {"number": 0},
    ],
)
def test_a_damaged_line_is_left_out_and_counted(line: Line, tmp_path: Path) -> None:
    sound = [SEARCH, trial(0, rate=0.1), result(0, 3, 0.5), {**trial(1_000_000), "repeat_of": 0}]
    written = [*sound[:2], line, *sound[2:]]
    text = "".join(json.dumps(one) + "\n" for one in written)
    (tmp_path / JOURNAL_FILE).write_text(text + "{torn}\n" + '{"kind": "start", "numb')
    content = read_journal(tmp_path)
    assert (content.lines, content.num_damaged) == (sound, 2)
    assert content.notes == ["search.jsonl: 2 lines are damaged and left out"]


def test_a_journal_whose_settings_are_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_text('{"kind": "search", "version": 1}\n')
    with pytest.raises(ConfigError, match="no line has the settings"):
        read_journal(tmp_path)


def search(**changes: Any) -> SearchConfig:
    space = {"rate": {"type": "choice", "values": [1, 2, 3]}}
    return SearchConfig.model_validate({"space": space, "num_trials": 9, **changes})


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8), st.booleans())
def test_the_ranking_is_that_of_sorted_values(values: list[float], less: bool) -> None:
    metric = "validation/loss" if less else "validation/accuracy"
    lines = [
        line
        for number, value in enumerate(values)
        for line in (trial(number), result(number, 5, value), end(number))
    ]
    rows = ranked(list(trials_of(lines).values()), metric, search(), best=False)
    assert [row.value for row in rows] == sorted(values, reverse=not less)
    best = best_of(rows)
    assert best is not None
    assert best.value == (min(values) if less else max(values))


def test_failed_and_forbidden_trials_come_last_and_are_never_the_best() -> None:
    lines = [
        *(trial(number) for number in range(5)),
        result(0, 5, 0.9, violations=["too large"]),
        end(0),
        result(1, 5, 0.5),
        end(1),
        result(2, 5, 0.99),
        end(2, "failed", reason="no memory"),
        result(3, 5, 0.7),
        end(3, "stopped"),
        result(4, 5, None),
        end(4),
    ]
    rows = ranked(list(trials_of(lines).values()), "validation/accuracy", search(), best=False)
    assert [row.trial.number for row in rows] == [3, 1, 0, 4, 2]
    best = best_of(rows)
    assert best is not None
    assert best.trial.number == 1  # the stopped one has no finished run


def test_a_trial_counts_by_the_mean_of_its_runs_and_repetitions() -> None:
    lines = [
        trial(0),
        result(0, 5, 0.4, run="seed_0"),
        result(0, 5, 0.6, run="seed_1"),
        end(0),
        {**trial(1_000_000), "repeat_of": 0},
        result(1_000_000, 5, 0.8, run="seed_2"),
        end(1_000_000),
    ]
    (row,) = ranked(list(trials_of(lines).values()), "validation/accuracy", search(), best=False)
    assert row.value == pytest.approx(0.6)
    assert row.spread == pytest.approx(0.2)
    assert row.num_runs == 3


def test_the_best_value_of_a_run_counts_if_asked() -> None:
    lines = [trial(0), result(0, 5, 0.9), result(0, 10, 0.7), end(0)]
    trials = list(trials_of(lines).values())
    assert ranked(trials, "validation/accuracy", search(), best=True)[0].value == 0.9
    assert ranked(trials, "validation/accuracy", search(), best=False)[0].value == 0.7
    assert ranked(trials, "validation/loss", search(), best=True)[0].value == 0.7


def test_a_mean_of_which_a_part_is_missing_is_missing() -> None:
    assert mean_and_spread([1.0, None]) == (None, None)
    assert mean_and_spread([]) == (None, None)
    assert mean_and_spread([2.0]) == (2.0, None)


def test_lines_of_a_run_count_once_however_the_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower, series = GrowingLines(path), MetricSeries("validation/loss")

    def read() -> list[tuple[int, float]]:
        for line in follower.read_new():
            series.add(line)
        return series.history

    def lines(*steps: int) -> str:
        return "".join(json.dumps({"step": step, "validation/loss": step / 10}) + "\n" for step in steps)

    assert read() == []
    path.write_text(lines(1, 2) + '{"step": 3, "vali')
    assert read() == [(1, 0.1), (2, 0.2)]
    resumed = tmp_path / "new"  # as long as the old file, and its third line is before the old one's end
    resumed.write_text(lines(1, 2, 3).replace(" ", "") + json.dumps({"step": 0, "note": "x" * 200}) + "\n")
    resumed.replace(path)
    assert read() == [(1, 0.1), (2, 0.2), (3, 0.3)]
    with path.open("a") as file:
        file.write(lines(4))
    assert read()[-1] == (4, 0.4)
    assert len(read()) == 4


@pytest.mark.parametrize(
    ("names", "stopping", "metric"),
    [
        (["validation/loss", "validation/accuracy"], None, "validation/accuracy"),
        (["validation/loss", "validation/perplexity"], None, "validation/loss"),
        (["validation/loss", "validation/accuracy"], {"metric": "loss"}, "validation/loss"),
        (["validation/recall"], None, "validation/recall"),
        (["loss"], None, "loss"),
    ],
)
def test_the_main_metric_is_that_of_early_stopping_or_the_one_that_people_name(
    names: list[str], stopping: Any, metric: str
) -> None:
    assert main_metric(names, stopping) == metric


def test_a_constraint_holds_for_the_worst_value_of_a_run_and_the_last_of_validation() -> None:
    constraints = (
        ConstraintConfig(metric="peak_memory_bytes", max=100),
        ConstraintConfig(metric="validation/accuracy", min=0.5),
    )
    series = MetricSeries("validation/loss", constraints=constraints)
    series.add({"step": 1, "loss": 1.0, "peak_memory_bytes": 120})
    series.add({"step": 2, "loss": 1.0, "peak_memory_bytes": 80})
    series.add({"step": 2, "validation/accuracy": 0.1, "validation/loss": 1.0})
    assert len(series.violations) == 2
    series.add({"step": 4, "validation/accuracy": 0.6, "validation/loss": 1.0})
    assert series.violations == ["peak_memory_bytes 120 is more than 100"]


def test_a_metric_that_no_run_reports_is_refused_with_the_names_that_there_are() -> None:
    series = MetricSeries("validation/accuracies")
    series.add({"step": 1, "loss": 1.0, "validation/accuracy": 0.5})
    with pytest.raises(
        ConfigError, match=r"search.metric=validation/accuracies: no run reports it. Did you mean"
    ):
        series.require_known()
