"""What a run keeps of its evaluations besides metrics: true, bounded, once, and the same on any ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.rank_pool import run_ranks
from support.small_runs import fine_tuning, pretraining, run, run_until_power_cut

from distft.config import parse
from distft.errors import ConfigError
from distft.objective.findings import MOST_MISTAKES, mistakes_of, wrong_rows
from distft.run.check import check_run
from distft.run.config import RunConfig
from distft.run.generate import GenerationOptions, generate_text
from distft.run.predict import predict_file
from distft.topology import Topology
from distft.tracker import read_lines

PROMPTS = ("the cat", "", "a dog sat on")


def _recorded(run_dir: Path) -> list[dict[str, Any]]:
    lines = read_lines(run_dir / "evaluations.jsonl")
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def _with_samples(data: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    evaluation = {"every_steps": 6, "samples": {"prompts": list(PROMPTS), "max_new_tokens": 9}}
    schedule = {"type": "constant", "warmup_steps": 2}
    optim = {"peak_lr": 0.03, "schedule": schedule}
    return pretraining(data, run_dir, evaluation=evaluation, optim=optim, **changes)


@pytest.mark.ranks
def test_samples_are_those_of_the_checkpoint_and_the_same_on_any_ranks(data: Path, tmp_path: Path) -> None:
    run(Topology(), _with_samples(data, tmp_path / "one"))
    recorded = _recorded(tmp_path / "one")
    assert [line["step"] for line in recorded] == [6, 12]
    options = GenerationOptions(max_new_tokens=9, temperature=0.0)
    texts = generate_text(str(tmp_path / "one"), PROMPTS, options, on_note=lambda _: None)
    samples = recorded[-1]["samples"]
    assert [sample["prompt"] + sample["text"] for sample in samples] == texts
    assert any(len(set(sample["text"])) > 1 for sample in samples), "the texts say something"
    engine = {"type": "zero", "zero_stage": 3}
    run_ranks(run, 2, _with_samples(data, tmp_path / "two", engine=engine), timeout_s=120)
    assert _recorded(tmp_path / "two") == recorded


@pytest.mark.ranks
def test_mistakes_are_the_surest_of_the_wrong_predictions(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    run(Topology(), fine_tuning(data, tmp_path / "one", pretrained))
    (line,) = _recorded(tmp_path / "one")
    (found,) = line["classifiers"]
    predict_file(str(tmp_path / "one"), str(data / "test.jsonl"), str(tmp_path / "p.jsonl"), Topology())
    predicted = [json.loads(text) for text in (tmp_path / "p.jsonl").read_text().splitlines()]
    rows = [json.loads(text) for text in (data / "test.jsonl").read_text().splitlines()]
    wrong = [
        (i, p["label"], p["probability"]) for i, p in enumerate(predicted) if p["label"] != rows[i]["label"]
    ]
    wrong.sort(key=lambda mistake: (-mistake[2], mistake[0]))
    assert wrong
    assert (found["num_rows"], found["num_wrong"]) == (len(rows), len(wrong))
    counts = {(row, column): count for row, line in zip(found["labels"], found["confusion"], strict=True)
              for column, count in zip(found["labels"], line, strict=True) if count}  # fmt: skip
    pairs = [(row["label"], p["label"]) for row, p in zip(rows, predicted, strict=True)]
    assert counts == {pair: pairs.count(pair) for pair in pairs}
    kept = found["mistakes"]
    assert [(m["row"] - 1, m["predicted"]) for m in kept] == [
        (i, label) for i, label, _ in wrong[:MOST_MISTAKES]
    ]
    for mistake, (i, _, probability) in zip(kept, wrong, strict=False):
        assert mistake["probability"] == pytest.approx(probability, abs=1e-4)
        assert mistake["label"] == rows[i]["label"]
        assert rows[i]["text"].startswith(mistake["text"].removesuffix("…"))
    two = fine_tuning(data, tmp_path / "two", pretrained, engine={"type": "zero", "zero_stage": 1})
    run_ranks(run, 2, two, timeout_s=120)
    assert _recorded(tmp_path / "two") == [line]


def test_a_resumed_run_has_each_evaluation_once(data: Path, tmp_path: Path) -> None:
    raw = _with_samples(data, tmp_path, checkpoint={"every_steps": 4, "in_background": False})
    run_until_power_cut(raw, 7)  # behind the evaluation of step 6, and the commit of step 4
    run(Topology(), raw)
    assert [line["step"] for line in _recorded(tmp_path)] == [6, 12]


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        (
            ["a dog sat on the mat at"],
            {},
            r"prompts\.0 has 2\d tokens, and with max_new_tokens=9 more than model\.max_seq_len=24",
        ),
        (["\ud800"], {}, "half of a surrogate pair"),
        (["x"], {"objective": {"type": "masked_lm"}}, "needs a language model that reads from left to right"),
        (["x"], {"validation": None}, "evaluation.samples is set, but validation is not"),
        ([], {}, "samples.prompts"),
    ],
)
def test_samples_that_cannot_be_are_an_error_before_training(
    data: Path, tmp_path: Path, prompts: list[str], changes: dict[str, Any], message: str
) -> None:
    raw = _with_samples(data, tmp_path, **changes)
    raw["evaluation"] = {"samples": {"prompts": prompts, "max_new_tokens": 9}}
    if "objective" in changes:
        raw["model"] = {**raw["model"], "attention": "bidirectional"}
    with pytest.raises(ConfigError, match=message):
        check_run(parse(RunConfig, raw), Topology())


@given(
    rows=st.lists(
        st.tuples(st.integers(0, 2), st.lists(st.integers(-3, 3), min_size=3, max_size=3)), max_size=60
    ),
    size=st.integers(1, 30),
)
def test_how_rows_are_batched_changes_no_mistake(rows: list[tuple[int, list[int]]], size: int) -> None:
    logits = torch.tensor([row[1] for row in rows]).reshape(-1, 3).double()
    labels = torch.tensor([row[0] for row in rows], dtype=torch.int64)
    numbers = torch.arange(len(rows))
    parts = [
        wrong_rows(logits[i : i + size], labels[i : i + size], numbers[i : i + size])
        for i in range(0, max(len(rows), 1), size)
    ]
    kept = mistakes_of(torch.cat(parts), ["a", "b", "c"])
    probabilities = logits.softmax(dim=1)
    wrong = [i for i in range(len(rows)) if int(logits[i].argmax()) != rows[i][0]]
    wrong.sort(key=lambda i: (-float(probabilities[i].max()), i))
    assert [mistake.number for mistake in kept] == wrong[:MOST_MISTAKES]
