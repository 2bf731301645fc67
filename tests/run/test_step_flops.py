"""The FLOPs of a step, for MFU and `config check`, against those that torch counts in a real step."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_runs import make_text_data, pretraining, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distft.collectives import SingleProcess
from distft.config import parse
from distft.data.batch import Batch, MixedBatch
from distft.model.counts import num_attention_pairs
from distft.objective.interface import ObjectiveContext
from distft.run.check import check_run
from distft.run.config import RunConfig
from distft.run.model import build_module
from distft.run.run_inputs import RunInputs
from distft.topology import Topology
from distft.train.throughput import Throughput

OBJECTIVES: list[tuple[str, dict[str, Any]]] = [
    ("causal", {"type": "causal_lm"}),
    ("bidirectional", {"type": "masked_lm"}),
    ("bidirectional", {"type": "masked_lm", "mask_rate": 0.4}),
    ("bidirectional", {"type": "next_sentence", "masking": {"mask_rate": 0.3}}),
    ("bidirectional", {"type": "sentence_order"}),
    ("bidirectional", {"type": "replaced_token", "generator_size": 0.5}),
    ("causal", {"type": "prefix_lm", "min_prefix_share": 0.6}),
    ("causal", {"type": "span_corruption", "noise_density": 0.3}),
    ("causal", {"type": "contrastive", "views": "dropout"}),
    ("causal", {"type": "contrastive", "views": "crops", "crop_share": [0.9, 1.0]}),
]
UNLABELLED: list[dict[str, Any]] = [
    {"type": "pseudo_label", "threshold": 0.0},
    {"type": "consistency"},
    {"type": "entropy"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_data(tmp_path_factory.mktemp("data"))


def inputs_of(raw: dict[str, Any]) -> RunInputs:
    """With a vocabulary that costs more than the blocks."""
    raw["model"] |= {"pad_vocab_to": 512, "dropout": 0.1}
    return check_run(parse(RunConfig, {**raw, "validation": None}), Topology())[1]


def counted_flops(inputs: RunInputs, start: int = 0, stop: int = 40) -> tuple[float, float]:
    """Of one pass of these sequences as torch counts them, and as `inputs` does."""
    objective = inputs.config.objective
    module = build_module(inputs.model, inputs.heads).to_empty(device="cpu").train()
    for param in module.parameters():
        torch.nn.init.normal_(param, std=0.02)
    batch = inputs.train.batch(start, stop).for_step(3)
    state = {name: torch.tensor(values) for name, values in objective.initial_state(inputs.heads).items()}
    context = ObjectiveContext(inputs.model.vocabulary_size or 0, SingleProcess(), state=state)
    # The loss adds the gradient of the output's weight in place, which torch does not count by itself.
    counting = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops})
    with sdpa_kernel(SDPBackend.MATH), counting as counter:
        (prepared,) = objective.prepare_step(module, [batch], context)
        loss = sum(objective.loss_sums(module, prepared, context).values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
    streams = batch.streams if isinstance(batch, MixedBatch) else {"": batch}
    expected = sum(inputs.training_flops[name].of(*dense_work(own)) for name, own in streams.items())
    return float(counter.get_total_flops()), expected


def addmm_flops(_: Any, left: Any, right: Any, **_shapes: Any) -> int:
    """From the shapes of the arguments."""
    return int(2 * left[0] * left[1] * right[1])


def dense_work(batch: Batch) -> tuple[int, int]:
    """Tokens and pairs, where attention between documents and of padding is computed too."""
    num_rows, width = batch.input_ids.shape
    return num_rows * width, num_rows * width**2


@pytest.mark.parametrize(("attention", "objective"), OBJECTIVES, ids=str)
def test_a_step_costs_the_passes_and_logits_that_the_objective_names(
    data: Path, tmp_path: Path, attention: str, objective: dict[str, Any]
) -> None:
    raw = pretraining(data, tmp_path, objective=objective)
    raw["model"]["attention"] = attention
    counted, expected = counted_flops(inputs_of(raw))
    assert expected == pytest.approx(counted, rel=0.08)  # how many tokens are targets is drawn


def test_a_pair_of_answers_costs_two_rows_and_logits_of_the_answers_alone(data: Path, tmp_path: Path) -> None:
    row = {"prompt": "the cat sat on", "chosen": " a mat", "rejected": " a big red moon"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    pairs = {"type": "preferences", "path": str(tmp_path / "pairs.jsonl")}
    raw = pretraining(data, tmp_path, data=pairs, objective={"type": "preference", "loss": "orpo"})
    raw["tokenizer"] = str(data / "tokenizer.model")
    inputs = inputs_of(raw)
    counted, expected = counted_flops(inputs, stop=8)
    # The backward computes the logits again, which is no work of the model.
    batch = inputs.train.batch(0, 8)
    assert isinstance(batch, Batch)
    num_answers = batch.num_targets["answer"]
    again = 2 * num_answers * inputs.model.padded_vocab_size * inputs.model.output_size
    assert counted - again == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "prefix_lm", "min_prefix_share": 0.6},
        {"type": "span_corruption", "noise_density": 0.3},
        {"type": "contrastive", "views": "dropout"},
    ],
    ids=lambda objective: str(objective["type"]),
)
def test_an_encoder_costs_what_the_sources_do_and_a_decoder_what_the_targets_do(
    data: Path, tmp_path: Path, objective: dict[str, Any]
) -> None:
    raw = pretraining(data, tmp_path, objective=objective)
    raw["model"] = {"type": "encoder_decoder", "num_encoder_layers": 2, **raw["model"]}
    del raw["model"]["num_layers"]
    inputs = inputs_of(raw)
    # Row by row: of several the shorter sources and targets are padded, which is no work that counts.
    num_rows = 1 if objective["type"] == "contrastive" else 12
    pairs = [counted_flops(inputs, row, row + 1) for row in range(num_rows)]
    counted, expected = (sum(values) for values in zip(*pairs, strict=True))
    assert expected == pytest.approx(counted, rel=0.08)


@pytest.mark.parametrize("part", UNLABELLED, ids=lambda part: str(part["type"]))
def test_a_step_with_unlabelled_rows_costs_one_pass_of_each_view(
    data: Path, tmp_path: Path, part: dict[str, Any]
) -> None:
    labelled = {"type": "labelled", "path": str(data / "train.jsonl")}
    raw = pretraining(data, tmp_path, tokenizer=str(data / "tokenizer.model"), compare_with_supervised=False)
    raw["data"] = {
        "type": "streams",
        "streams": {"topic": {"data": labelled}, "rows": {"share": 3, "data": {**labelled, "label": None}}},
    }
    parts = {
        "topic": {"objective": {"type": "classification"}},
        "rows": {"objective": part | {"head": "topic"}},
    }
    raw["objective"] = {"type": "mixture", "parts": parts}
    counted, expected = counted_flops(inputs_of(raw))
    assert expected == pytest.approx(counted, rel=0.02)


def test_the_cost_of_a_run_counts_the_pairs_in_a_window(data: Path, tmp_path: Path) -> None:
    costs = {}
    for window in (None, 3, 9):
        raw = pretraining(data, tmp_path)
        raw["model"]["sliding_window"] = window
        inputs = inputs_of(raw)
        seq_len, flops = inputs.config.batch.seq_len, inputs.training_flops[""]
        near = num_attention_pairs(seq_len, inputs.model.attention_reach)
        per_row = flops.of(seq_len, 0 if window else seq_len**2, near)
        num_rows = inputs.config.batch.global_batch_size * inputs.total_steps
        assert inputs.run_flops == pytest.approx(per_row * num_rows)
        costs[window] = inputs.run_flops
    assert costs[3] < costs[9] < costs[None]


def test_a_run_counts_the_pairs_in_a_window_of_each_micro_batch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[int, int, int]] = []
    add_step = Throughput.add_step

    def recording(self: Throughput, batches: Any, num_ranks: int, wait_s: float) -> None:
        counted.extend(batch.work[""] for batch in batches)
        add_step(self, batches, num_ranks, wait_s)

    monkeypatch.setattr(Throughput, "add_step", recording)
    raw = pretraining(data, tmp_path, train={"max_steps": 2, "log_every_steps": 1})
    raw["model"]["sliding_window"] = 1
    run(Topology(), raw)
    assert counted
    assert all(num_local == num_tokens < num_pairs for num_tokens, num_pairs, num_local in counted)
