"""The report of a search: ranks, importance, and files that are not what they should be."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from distft.cli.main import main
from distft.errors import ConfigError
from distft.report.importance import importances
from distft.report.page import content_of, page_of
from distft.report.search import RecordedSearch
from distft.report.search_charts import search_charts
from distft.report.search_page import search_page


def test_trials_are_ranked_and_failures_have_their_reason(search: Path) -> None:
    found = RecordedSearch.read(search)
    assert [trial.number for trial in found.ranked] == [8, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 0]
    assert [trial.number for trial in found.trials if trial.reason] == [7, 15]
    page = search_page(found)
    assert "The best settings: trial 8" in page.body
    assert page.body.count("the loss is not finite") == 2
    assert len(page.charts) == 4


def test_a_trial_that_violates_a_constraint_is_not_the_best(search: Path) -> None:
    file = search / "search.json"
    content = json.loads(file.read_text())
    content["trials"][8]["violations"] = ["peak_memory_bytes is 3 GiB, above 2 GiB"]
    file.write_text(json.dumps(content))
    found = RecordedSearch.read(search)
    assert (found.ranked[0].number, found.ranked[-1].number) == (9, 8)
    assert "above 2 GiB" in search_page(found).body
    history = search_charts(found)[0].spec["data"]["values"]
    assert max(row["best"] for row in history) == found.ranked[0].metric


def test_every_value_of_every_trial_is_on_its_axis(search: Path) -> None:
    found = RecordedSearch.read(search)
    *_, parallel = search_charts(found)
    lines, ticks = (layer["data"]["values"] for layer in parallel.spec["layer"])
    assert {(line["trial"], line["axis"]) for line in lines} == {
        (trial.number, axis)
        for trial in found.ranked
        for axis in ("peak_lr", "num_layers", "type", "validation/accuracy")
    }
    rates = {line["trial"]: line["height"] for line in lines if line["axis"] == "peak_lr"}
    assert [rates[number] for number in (0, 14)] == [0.0, 1.0]
    assert rates[5] == pytest.approx(5 / 14), "the axis of rates is logarithmic"
    assert {tick["text"] for tick in ticks if tick["axis"] == "num_layers"} == {"0", "1", "2"}


def test_importance_is_that_of_the_setting_that_decides(search: Path) -> None:
    ranked = RecordedSearch.read(search).ranked
    columns = {key: [trial.values[key] for trial in ranked] for key in ranked[0].values}
    shares = importances(columns, [trial.metric or 0.0 for trial in ranked])
    assert next(iter(shares)) == "optim.peak_lr"
    assert shares["optim.peak_lr"] > 0.8
    assert shares["optim.type"] == 0.0
    assert shares["model.num_layers"] < 0.3
    assert importances(columns, [1.0] * len(ranked)) == dict.fromkeys(columns, 0.0)
    assert importances({"a": ["x", "y"] * 5}, [0.0, 1.0] * 5) == {"a": pytest.approx(1.0)}
    assert importances({"a": [1]}, [1.0]) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": 3}, "metric is no text"),
        ({"direction": "up"}, "direction is 'up', and must be min or max"),
        ({"space": []}, "space is no object"),
        ({"trials": {}}, "trials is no list"),
        ({"trials": [3]}, "trials.0 is no object"),
        (
            {"trials": [{}]},
            "trials.0.number is missing; trials.0.values is missing; trials.0.state is missing",
        ),
        (
            {"trials": [{"number": 1, "state": "x", "values": {}, "metric": "0.5"}]},
            "trials.0.metric is no number",
        ),
        ({"trials": [{"number": 1, "state": "x", "values": {}, "history": [[1]]}]}, "history is no list of"),
    ],
)
def test_a_damaged_search_is_an_error_that_says_what(
    search: Path, change: dict[str, Any], message: str
) -> None:
    file = search / "search.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=f"search.json is damaged, or no search of distft: .*{message}"):
        RecordedSearch.read(search)


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"3"])
def test_a_file_that_is_no_json_object_is_an_error(
    search: Path, text: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (search / "search.json").write_bytes(text)
    assert main(["report", str(search), "-o", str(search / "report.html")]) == 2
    assert "search.json is damaged" in capsys.readouterr().err
    assert not (search / "report.html").exists()


def test_a_search_of_a_newer_version_or_without_its_file_is_told(search: Path) -> None:
    file = search / "search.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(ConfigError, match="is of version 2, and this distft reads up to 1: upgrade distft"):
        content_of([search])
    file.write_text(json.dumps(content | {"version": "2"}))
    with pytest.raises(ConfigError, match="version is no int"):
        content_of([search])
    file.unlink()
    (search / "search.jsonl").touch()
    with pytest.raises(ConfigError, match=r"without search\.json: the same `distft tune` command writes it"):
        content_of([search])
    file.mkdir()
    with pytest.raises(ConfigError, match=r"search\.json cannot be read: Is a directory"):
        content_of([search])


def test_a_search_that_is_starting_has_a_page(search: Path, runs: Path) -> None:
    file = search / "search.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"trials": []}))
    content, notes = content_of([search])
    assert notes == [f"{search}: no trial has a value yet"]
    assert b"None has a value yet." in page_of(content)
    with pytest.raises(ConfigError, match="is a search, which has a report of its own: give it alone"):
        content_of([runs / "first", search])


_VALUES = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5)


@given(
    trials=st.lists(st.tuples(_VALUES, _VALUES, st.none() | st.floats()), max_size=12),
    direction=st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_have_a_page_or_an_error(
    tmp_path: Path, trials: list[tuple[Any, Any, Any]], direction: bool
) -> None:
    content = {
        "metric": "</script>",
        "direction": "max" if direction else "min",
        "space": {"a": {}, "b.</td><script>": {}},
        "trials": [
            {"number": i, "state": "done", "values": {"a": a, "b.</td><script>": b}, "metric": metric}
            for i, (a, b, metric) in enumerate(trials)
        ],
    }
    (tmp_path / "search.json").write_text(json.dumps(content))
    try:
        found = RecordedSearch.read(tmp_path)
    except ConfigError:
        assert any(metric is not None and not abs(metric) < 1e300 for *_, metric in trials)
        return
    page = page_of(search_page(found)).decode()
    assert page.count("<script") == 3
