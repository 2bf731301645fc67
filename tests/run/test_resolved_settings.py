"""Settings whose default depends on the model or the data: their values are saved, and keep their meaning."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import (
    events,
    fine_tuning,
    logged,
    make_text_data,
    pretraining,
    run,
    run_until_power_cut,
)

from distft.checkpoint.committed import find_checkpoint
from distft.config import load_yaml, parse
from distft.data.labelled import LabelledConfig
from distft.errors import ConfigError
from distft.run.check import check_run, describe_run
from distft.run.config import RunConfig
from distft.run.pretrained import evaluate_checkpoint, open_model
from distft.topology import Topology


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and in ratings.csv numbers for those that are labelled."""
    folder = make_text_data(tmp_path_factory.mktemp("data"))
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        with (folder / f"{name}_ratings.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([row["text"], 3.5 + len(row["text"]) % 7 / 4] for row in rows)
    return folder


def regression(data: Path, run_dir: Path, **objective: Any) -> dict[str, Any]:
    own = {"type": "labelled", "path": str(data / "train_ratings.csv"), "labels": "number"}
    return pretraining(
        data,
        run_dir,
        tokenizer=str(data / "tokenizer.model"),
        data=own,
        validation={**own, "path": str(data / "test_ratings.csv")},
        objective={"type": "regression", **objective},
        train={"max_steps": 4, "log_every_steps": 1},
        checkpoint={"every_steps": 2},
    )


def test_a_regression_learns_standardised_numbers_whose_mean_and_deviation_its_checkpoint_has(
    data: Path, tmp_path: Path
) -> None:
    metrics = run(Topology(), regression(data, tmp_path / "run")).metrics
    with (data / "train_ratings.csv").open() as file:
        numbers = [float(row["label"]) for row in csv.DictReader(file)]
    mean = sum(numbers) / len(numbers)
    deviation = math.sqrt(sum((number - mean) ** 2 for number in numbers) / len(numbers))
    saved = find_checkpoint(str(tmp_path / "run")).manifest.config["objective"]
    assert (saved["offset"], saved["scale"]) == pytest.approx((mean, deviation))
    assert load_yaml(tmp_path / "run" / "config.yaml")["objective"] == saved
    # The first outputs are about 0; the squares of the standardised numbers are 1 on average.
    assert logged(tmp_path / "run")[1] == pytest.approx(1, abs=0.7)
    lines = [event["summary"] for event in events(tmp_path / "run") if event["kind"] == "data"]
    assert f"a number is learnt as (number - {mean:.6g}) / {deviation:.6g}" in lines
    found = evaluate_checkpoint(str(tmp_path / "run"), [], Topology())
    assert found["mean_absolute_error"] == pytest.approx(metrics["validation/mean_absolute_error"])


def test_a_regression_resumes_and_another_spread_of_the_numbers_is_refused(
    data: Path, tmp_path: Path
) -> None:
    raw = regression(data, tmp_path / "cut")
    run_until_power_cut(raw, 3)
    with pytest.raises(ConfigError, match=r"objective\.scale was 0\..* and is now 1\.0"):
        run(Topology(), regression(data, tmp_path / "cut", scale=1.0))
    run(Topology(), raw)
    assert max(logged(tmp_path / "cut")) == 4


@pytest.mark.parametrize("given", [{"offset": 2.0}, {"scale": 3.0}, {"offset": 2.0, "scale": 3.0}])
def test_given_values_are_kept(data: Path, tmp_path: Path, given: dict[str, float]) -> None:
    _, inputs = check_run(parse(RunConfig, regression(data, tmp_path, **given)), Topology())
    found = inputs.config.objective.model_dump()
    assert {name: found[name] for name in given} == given
    assert None not in (found["offset"], found["scale"])


def test_the_parts_of_a_mixture_take_the_numbers_of_their_own_streams(data: Path, tmp_path: Path) -> None:
    raw = regression(data, tmp_path)
    equal = tmp_path / "equal.csv"
    equal.write_text("text,label\na cat,0.1\na dog,0.1\nthe cat,0.1\n")
    other = {**raw["data"], "path": str(equal)}
    raw["data"] = {"type": "streams", "streams": {"a": {"data": raw["data"]}, "b": {"data": other}}}
    part = {"objective": {"type": "regression"}}
    raw |= {"validation": None, "objective": {"type": "mixture", "parts": {"a": part, "b": part}}}
    _, inputs = check_run(parse(RunConfig, raw), Topology())
    parts = inputs.config.objective.model_dump()["parts"]
    assert parts["a"]["objective"]["offset"] == pytest.approx(4.2, abs=0.3)
    assert (parts["b"]["objective"]["offset"], parts["b"]["objective"]["scale"]) == (pytest.approx(0.1), 1.0)


def aligned(data: Path, run_dir: Path, **objective: Any) -> dict[str, Any]:
    """Pseudo-labels beside the first 12 labelled rows."""
    raw = pretraining(data, run_dir, tokenizer=str(data / "tokenizer.model"), validation=None)
    own = {"type": "labelled", "path": str(data / "train.jsonl")}
    streams = {"topic": {"data": {**own, "max_rows": 12}}, "texts": {"data": {**own, "label": None}}}
    part = {"type": "pseudo_label", "head": "topic", "threshold": 0.34, "align": True, **objective}
    return raw | {
        "data": {"type": "streams", "streams": streams},
        "objective": {
            "type": "mixture",
            "parts": {"topic": {"objective": {"type": "classification"}}, "texts": {"objective": part}},
        },
        "compare_with_supervised": False,
        "num_threads": 1,
        "train": {"max_steps": 4, "log_every_steps": 1},
        "checkpoint": {"every_steps": 2},
    }


def class_shares(saved: dict[str, Any]) -> Any:
    return saved["objective"]["parts"]["texts"]["objective"]["class_shares"]


def test_an_alignment_has_the_shares_of_the_labelled_rows_and_its_checkpoint_has_them(
    data: Path, tmp_path: Path
) -> None:
    raw = aligned(data, tmp_path)
    run_until_power_cut(raw, 3)
    run(Topology(), raw)  # the same settings resume
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:12]]
    labels = [row["label"] for row in rows]
    shares = [labels.count(label) / 12 for label in ("bird", "cat", "dog")]
    assert len(set(shares)) > 1
    assert class_shares(find_checkpoint(str(tmp_path)).manifest.config) == pytest.approx(shares)
    assert class_shares(load_yaml(tmp_path / "config.yaml")) == pytest.approx(shares)
    lines = [event["summary"] for event in events(tmp_path) if event["kind"] == "data"]
    shown = ", ".join(f"{share:.3g}" for share in shares)
    assert f"texts: predictions are aligned with the class shares {shown}" in lines


def test_a_run_that_aligned_with_equal_shares_keeps_them(data: Path, tmp_path: Path) -> None:
    """As one of a version in which these were the default: it saved null."""
    before = aligned(data, tmp_path, class_shares=None)
    run_until_power_cut(before, 3)
    saved = load_yaml(tmp_path / "config.yaml")
    assert class_shares(saved) is None
    with pytest.raises(ConfigError, match=r"texts\.objective\.class_shares was (None|null) and is now "):
        run(Topology(), aligned(data, tmp_path))
    run(Topology(), saved)
    assert max(logged(tmp_path)) == 4


@pytest.mark.parametrize(("attention", "pooling"), [("causal", "last"), ("bidirectional", "mean")])
@pytest.mark.parametrize("objective", ["classification", "contrastive", "sentence_order"])
def test_the_pooling_depends_on_the_model_alone_and_is_saved(
    data: Path, tmp_path: Path, attention: str, pooling: str, objective: str
) -> None:
    raw = pretraining(data, tmp_path, objective={"type": objective}, train={"max_steps": 2})
    raw["model"]["attention"] = attention
    if objective != "sentence_order":
        own: dict[str, Any] = {"type": "labelled", "path": str(data / "train.jsonl")}
        if objective == "contrastive":
            own = {"type": "pairs", "path": own["path"], "text": "label", "positive": "text"}
        raw |= {"data": own, "validation": None, "tokenizer": str(data / "tokenizer.model")}
    run(Topology(), raw)
    manifest = find_checkpoint(str(tmp_path)).manifest
    assert manifest.config["objective"]["pooling"] == pooling
    assert open_model(str(tmp_path)).config.objective.model_dump()["pooling"] == pooling


def test_a_run_saved_with_another_pooling_keeps_it(data: Path, tmp_path: Path) -> None:
    """As one of a version in which a bidirectional classifier pooled the last token by default."""
    run(Topology(), pretraining(data, tmp_path / "base", train={"max_steps": 2}))
    raw = fine_tuning(data, tmp_path / "run", tmp_path / "base", train={"max_steps": 2})
    run(Topology(), raw)
    assert open_model(str(tmp_path / "run")).config.objective.model_dump()["pooling"] == "mean"
    del raw["objective"]["pooling"]
    with pytest.raises(ConfigError, match=r"objective\.pooling was 'mean' and is now 'last'"):
        run(Topology(), {**raw, "train": {"max_steps": 3}})


@pytest.mark.parametrize(
    ("objective", "labels", "needed"),
    [
        ("regression", None, "number"),
        ("regression", "several", "number"),
        ("classification", "number", "one"),
        ("multi_label", None, "several"),
    ],
)
def test_labels_of_another_kind_than_the_objective_learns_are_one_error_with_the_remedy(
    data: Path, tmp_path: Path, objective: str, labels: str | None, needed: str
) -> None:
    raw = regression(data, tmp_path)
    raw["objective"] = {"type": objective}
    for use in ("data", "validation"):
        raw[use].pop("labels")
        raw[use] |= {} if labels is None else {"labels": labels}
    kind = labels or "one"
    with pytest.raises(ConfigError) as raised:
        parse(RunConfig, raw)
    assert len(str(raised.value).splitlines()) == 1
    assert f"data.labels={kind} and validation.labels={kind}: set labels={needed} there" in str(raised.value)
    streams = {"a": {"data": dict(raw["data"])}}
    raw |= {"data": {"type": "streams", "streams": streams}, "validation": None}
    raw["objective"] = {"type": "mixture", "parts": {"a": {"objective": {"type": objective}}}}
    with pytest.raises(ConfigError, match=rf"data\.streams\.a\.data\.labels={kind}: set labels={needed}"):
        parse(RunConfig, raw)


def test_the_labels_that_an_objective_names_are_those_of_the_data() -> None:
    kinds = LabelledConfig.model_fields["labels"].annotation
    for objective in ("classification", "multi_label", "regression"):
        raw = {"run_dir": "x", "model": {"max_seq_len": 8, "d_model": 8, "num_layers": 1, "num_heads": 1}}
        raw |= {"batch": {"global_batch_size": 1, "micro_batch_size": 1, "seq_len": 8}}
        raw |= {"optim": {"peak_lr": 1.0}, "train": {"max_steps": 1}, "objective": {"type": objective}}
        raw["data"] = {"type": "tokens", "sources": [{"path": "x"}]}
        config: RunConfig = parse(RunConfig, raw)
        assert config.objective.row_labels in kinds.__args__


def test_a_check_tells_and_counts_passes_without_a_gradient(data: Path, tmp_path: Path) -> None:
    raw = pretraining(data, tmp_path, objective={"type": "contrastive"}, validation=None)
    raw["tokenizer"] = str(data / "tokenizer.model")
    raw["data"] = {
        "type": "pairs",
        "path": str(data / "train.jsonl"),
        "text": "label",
        "positive": "text",
    }
    config: RunConfig = parse(RunConfig, raw)
    lines = describe_run(config, 1).lines
    assert "passes      a sequence takes 2 with a gradient and 2 without" in lines


def test_a_regressions_head_is_kept_for_numbers_in_the_same_units_only(data: Path, tmp_path: Path) -> None:
    """Its output means (number - offset) / scale: with another offset the same weights say something else."""
    run(Topology(), regression(data, tmp_path / "first", offset=1.0, scale=2.0))
    for units, is_new in (({"offset": 1.0, "scale": 2.0}, False), ({"offset": 5.0, "scale": 2.0}, True)):
        run_dir = tmp_path / f"next_{is_new}"
        raw = {**regression(data, run_dir, **units), "init_from": str(tmp_path / "first")}
        del raw["model"]
        run(Topology(), raw)
        (start,) = [event for event in events(run_dir) if event["kind"] == "start"]
        assert ("classifier" in start.get("new_parameters", "")) == is_new
