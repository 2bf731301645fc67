"""Complete runs of mixtures: errors before training, metrics, resume, audit and checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import run_ranks
from support.small_runs import fine_tuning, logged, pretraining, run, run_until_power_cut

from distft.checkpoint.committed import find_checkpoint
from distft.cli.main import main
from distft.config import parse
from distft.errors import ConfigError, DistftError
from distft.model.counts import training_flops
from distft.run.audit import audit_run
from distft.run.check import check_run, describe_run
from distft.run.config import RunConfig
from distft.run.pretrained import evaluate_checkpoint
from distft.topology import Topology

TEXT = {"objective": {"type": "causal_lm"}}
TOPIC = {"objective": {"type": "classification", "pooling": "mean"}, "weight": 0.5}


def labelled(path: Path) -> dict[str, Any]:
    return {"data": {"type": "labelled", "path": str(path)}}


def mixture(folder: Path, run_dir: Path, /, **changes: Any) -> dict[str, Any]:
    tokens = {"type": "tokens", "sources": [{"path": str(folder / "shards" / "train")}]}
    held_out = {"type": "tokens", "sources": [{"path": str(folder / "shards" / "validation")}]}
    streams = {"text": {"data": tokens, "share": 2}, "topic": labelled(folder / "train.jsonl")}
    held_out_streams = {"text": {"data": held_out}, "topic": labelled(folder / "test.jsonl")}
    raw = pretraining(folder, run_dir)
    return {
        **raw,
        "data": {"type": "streams", "streams": streams},
        "validation": {"type": "streams", "streams": held_out_streams},
        "objective": {"type": "mixture", "parts": {"text": dict(TEXT), "topic": dict(TOPIC)}},
        **changes,
    }


def error_of(raw: dict[str, Any]) -> str:
    with pytest.raises(DistftError) as caught:
        check_run(parse(RunConfig, raw), Topology())
    return str(caught.value)


def changed(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a dotted path; None removes it."""
    copy: dict[str, Any] = json.loads(json.dumps(raw))
    *parents, last = path.split(".")
    node = copy
    for key in parents:
        node = node[key]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return copy


MULTI = {"type": "mixture", "parts": {"text": TEXT, "topic": TOPIC}}


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("data.streams.topic", None, ["objective.parts.topic has no stream in data.streams"]),
        (
            "objective.parts.topic",
            None,
            ["data.streams.topic has no part", "validation.streams.topic has no"],
        ),
        (
            "objective",
            {"type": "causal_lm"},
            ["data.type=streams", "validation.type=streams", "objective.type=mixture"],
        ),
        (
            "data",
            {"type": "tokens", "sources": [{"path": "x"}]},
            ["data.type=tokens with objective.type=mixture", "data.type=streams"],
        ),
        ("validation", {"type": "labelled", "path": "x"}, ["validation.type=labelled", "the streams text"]),
        (
            "validation.streams.topics",
            {"data": {"type": "labelled", "path": "x"}},
            ["validation.streams.topics has no part", "Did you mean"],
        ),
        ("objective.parts.text.weight", -1, ["weight of text must not be below 0"]),
        ("objective.parts.text.weight", [[3, 1.0], [3, 2.0]], ["ascending"]),
        ("objective.parts", {"text": {**TEXT, "weight": 0}}, ["all weights are 0"]),
        ("objective.parts.text.objective", MULTI, ["objective.parts.text.objective"]),
        ("data.streams.text.share", 0.333333333, ["round"]),
        (
            "objective.parts.text.objective.type",
            "classification",
            ["objective.parts.text", "data.type=labelled"],
        ),
        (
            "objective.parts.topic.objective",
            {"type": "causal_lm"},
            ["objective.parts.topic", "continues texts"],
        ),
    ],
)
def test_a_bad_mixture_is_one_clear_error_before_training(
    data: Path, tmp_path: Path, path: str, value: Any, parts: list[str]
) -> None:
    text = error_of(changed(mixture(data, tmp_path / "run"), path, value))
    for part in parts:
        assert part in text
    assert len(text.splitlines()) <= len(parts)
    assert not (tmp_path / "run").exists()


def test_rows_that_do_not_fit_an_objective_are_told_with_its_part(data: Path, tmp_path: Path) -> None:
    rows = '{"text": "a cat", "second": "a dog"}\n{"text": "a dog", "second": "a cat"}\n'
    (tmp_path / "pairs.jsonl").write_text(rows)
    pairs = {"type": "pairs", "path": str(tmp_path / "pairs.jsonl"), "positive": "second"}
    tokenizer = str(data / "tokenizer.model")
    raw = mixture(data, tmp_path / "run", validation=None, tokenizer=tokenizer)
    raw = changed(raw, "data.streams.text.data", pairs)
    text = error_of(raw)
    assert "objective.parts.text: objective.type=causal_lm continues texts, and these rows are none" in text


def test_parts_share_a_head_if_their_labels_are_equal_and_only_then(data: Path, tmp_path: Path) -> None:
    shared = {"objective": {**TOPIC["objective"], "head": "both"}}  # type: ignore[dict-item]
    raw = mixture(data, tmp_path / "run", validation=None)
    raw["objective"]["parts"] = {"text": TEXT, "topic": shared, "other": shared}
    raw["data"]["streams"]["other"] = labelled(data / "test.jsonl")
    _, inputs = check_run(parse(RunConfig, raw), Topology())
    assert list(inputs.heads) == ["lm_head", "both"]
    for label, problem in (("fish", "one of the labels bird, cat, dog"), (None, "num_labels=3")):
        lines = [{"text": "a cat", "label": "cat"}, {"text": "a dog", "label": "dog"}]
        lines += [] if label is None else [{"text": "a fish", "label": label}]
        other = tmp_path / f"{label}.jsonl"
        other.write_text("".join(json.dumps(line) + "\n" for line in lines))
        raw["data"]["streams"]["other"] = labelled(other)
        text = error_of(raw)
        assert "objective.parts.other: its head 'both' is that of objective.parts.topic" in text
        assert problem in text


def test_a_check_describes_streams_and_parts_and_counts_the_flops_of_what_runs(
    data: Path, tmp_path: Path
) -> None:
    raw = mixture(data, tmp_path / "run")
    raw["objective"]["parts"]["topic"]["weight"] = [[0, 0.0], [10, 0.5]]
    lines = "\n".join(describe_run(parse(RunConfig, raw), 1).lines)
    assert "data        text: " in lines
    assert f"data        topic: {data}/train.jsonl: labels: " in lines
    assert "streams     of all sequences: text 66.7%, topic 33.3%" in lines
    assert "objective   text: causal_lm, weight 1" in lines
    assert "objective   topic: classification, weight 0 in step 0, 0.5 in step 10" in lines
    _, inputs = check_run(parse(RunConfig, raw), Topology())
    flops = [
        training_flops(inputs.model, 24, {head: inputs.heads[head]}).of(24, 24**2)
        for head in ("lm_head", "topic")
    ]
    assert inputs.run_flops == pytest.approx((2 * flops[0] + flops[1]) / 3 * 8 * 12)


@pytest.mark.parametrize("alternate", [False, True])
def test_a_run_logs_each_objective_and_audits_each_source(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], alternate: bool
) -> None:
    raw = mixture(data, tmp_path, evaluation={"every_steps": 6, "max_sequences": 5})
    raw["data"]["alternate"] = alternate
    result = run(Topology(), raw)
    text, topic, total = (logged(tmp_path, name) for name in ("text/loss", "topic/loss", "loss"))
    if alternate:  # steps of text, text, topic, ...; a term keeps its last value
        assert min(topic) == 2 or min(topic) == 3
        assert len(set(topic.values())) <= 4
    else:
        for step, loss in total.items():
            assert loss == pytest.approx(text[step] + 0.5 * topic[step], rel=1e-5)
    metrics = result.metrics
    assert metrics["validation/loss"] == pytest.approx(
        metrics["validation/text/loss"] + 0.5 * metrics["validation/topic/loss"]
    )
    assert 0 <= metrics["validation/topic/accuracy"] * 5 <= 5
    assert 0 < metrics["mfu"] < 2
    found, unknown = audit_run(str(tmp_path))
    assert (unknown, found.is_exact) == ("", True)
    assert found.uses_per_row is not None
    names = [source.name for source in found.uses_per_row]
    assert names == ["data.streams.text.data.sources.0", "data.streams.topic.data"]
    assert all(source.most - source.least <= 1 for source in found.uses_per_row)
    assert sum(source.num_rows for source in found.uses_per_row) > 48
    capsys.readouterr()
    assert main(["audit", str(tmp_path)]) == 0
    assert "each of the 48 rows of data.streams.topic.data was used 0 to 1 times" in capsys.readouterr().out
    saved = find_checkpoint(str(tmp_path)).manifest
    assert saved.label_names == {"topic": ["bird", "cat", "dog"]}
    evaluated = evaluate_checkpoint(str(tmp_path), ["evaluation.max_sequences=null"], Topology())
    assert evaluated["topic/accuracy"] * 19 == pytest.approx(round(evaluated["topic/accuracy"] * 19))


@pytest.mark.ranks
@pytest.mark.parametrize("alternate", [False, True])
def test_a_resume_at_another_world_size_goes_on_exactly(data: Path, tmp_path: Path, alternate: bool) -> None:
    def config(name: str, **changes: Any) -> dict[str, Any]:
        raw = mixture(data, tmp_path / name, **changes)
        raw["model"]["dropout"] = 0.2
        raw["data"]["alternate"] = alternate
        raw["batch"]["global_batch_size"] = 7
        raw["objective"]["parts"]["text"]["weight"] = [[2, 1.0], [10, 0.3]]
        return raw

    run(Topology(), config("straight"))
    run_until_power_cut(config("resumed"), 7)
    zero = {"type": "zero", "zero_stage": 3}
    run_ranks(_run, 2, config("resumed", engine=zero), timeout_s=200)
    for name in ("loss", "grad_norm", "text/loss", "topic/loss", "tokens_seen"):
        straight, resumed = logged(tmp_path / "straight", name), logged(tmp_path / "resumed", name)
        steps = [step for step in resumed if step > 7]
        assert [resumed[step] for step in steps] == pytest.approx(
            [straight[step] for step in steps], rel=2e-5
        )


def _run(topology: Topology, raw: dict[str, Any]) -> None:
    run(topology, raw)


def test_a_mixture_starts_a_task_and_a_task_starts_a_mixture(data: Path, tmp_path: Path) -> None:
    """A head goes along if it has the same name and the same labels."""
    run(Topology(), mixture(data, tmp_path / "mix"))
    task = {"type": "classification", "pooling": "mean"}

    def new_parameters(raw: dict[str, Any], run_dir: Path) -> str:
        run(Topology(), {**raw, "train": {"max_steps": 2, "log_every_steps": 1}})
        events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
        return str(events[0].get("new_parameters"))

    for head, expected in (("topic", "None"), (None, "classifier.weight")):
        directory = tmp_path / f"task_{head}"
        raw = fine_tuning(
            data, directory, tmp_path / "mix", trainable=["*"], objective={**task, "head": head}
        )
        assert new_parameters(raw, directory) in {expected, ""}
    start = tmp_path / "task_None"
    for head, expected in (("classifier", "lm_head.weight"), (None, "topic.weight")):
        directory = tmp_path / f"mix_{head}"
        raw = mixture(data, directory, init_from=str(start))
        del raw["model"]
        raw["objective"]["parts"]["topic"] = {"objective": {**task, "head": head}}
        found = new_parameters(raw, directory)
        assert ("topic.weight" in found) == (head is None), expected
        assert "classifier.weight" not in found


def test_only_one_kind_of_run_can_evaluate_a_mixture(data: Path, tmp_path: Path) -> None:
    run(Topology(), mixture(data, tmp_path, train={"max_steps": 2, "log_every_steps": 1}))
    validation = [f"validation={{type: labelled, path: {data / 'test.jsonl'}}}"]
    with pytest.raises(ConfigError, match=r"validation\.type=labelled with objective\.type=mixture"):
        evaluate_checkpoint(str(tmp_path), validation, Topology())


@pytest.mark.parametrize("kind", ["classification", "multi_label"])
def test_validation_rows_of_another_kind_are_refused_before_training(
    data: Path, tmp_path: Path, kind: str
) -> None:
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": "a cat", "label": 1.5}\n' * 3)
    raw = mixture(data, tmp_path / "run")
    raw["objective"]["parts"]["topic"] = {"objective": {"type": kind}}
    raw["data"]["streams"]["topic"]["data"]["labels"] = "one" if kind == "classification" else "several"
    raw["validation"]["streams"]["topic"] = labelled(numbers)
    for changes in ({"labels": "number"}, {"label": None}):
        raw["validation"]["streams"]["topic"]["data"] |= changes
        text = error_of(raw)
        assert "validation.streams.topic" in text
        assert kind in text


def test_weights_that_are_0_to_the_end_of_the_run_are_refused(data: Path, tmp_path: Path) -> None:
    raw = mixture(data, tmp_path / "run")  # of 12 steps
    late = [[11, 0.0], [20, 1.0]]
    raw["objective"]["parts"]["text"] = {**TEXT, "weight": late}
    checked = describe_run(parse(RunConfig, raw), 1)
    assert any("objective.parts.text.weight has points at steps 20" in line for line in checked.remarks)
    raw["objective"]["parts"]["topic"] = {**TOPIC, "weight": late}
    assert "all weights are 0 in the 12 steps" in error_of(raw)
    raw["objective"]["parts"]["topic"] = {**TOPIC, "weight": [[10, 0.0], [20, 1.0]]}
    check_run(parse(RunConfig, raw), Topology())


def test_numbers_with_which_the_loss_would_be_infinite_are_refused(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"text": "a cat", "label": 1.5}\n{"text": "a dog", "label": -3e30}\n')
    source = {"type": "labelled", "path": str(path), "labels": "number"}
    raw = pretraining(data, tmp_path / "run", data=source, validation=None)
    raw["tokenizer"] = str(data / "tokenizer.model")
    raw["objective"] = {"type": "regression", "offset": 1.5, "scale": 1.0}
    assert "the number -3e+30 of the data" in error_of(raw)
    for scale in (1e30, None):  # by default their deviation
        raw["objective"]["scale"] = scale
        check_run(parse(RunConfig, raw), Topology())
