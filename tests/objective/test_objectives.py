"""Objectives over real models: sums that add up over batches, and metrics against scikit-learn."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import SIZES, build
from torch import Tensor
from torch.nn.functional import cross_entropy

from distft.config import parse
from distft.data.batch import IGNORE_INDEX, Batch
from distft.errors import ConfigError
from distft.model.config import ClassificationHead, LanguageModelHead, ModelConfig
from distft.objective.settings import CausalLM, Classification, ObjectiveConfig

NAMES = ("a", "b", "c", "d")


def token_batch(rows: int, seed: int = 0, num_bytes: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 61, (rows, 9), generator=generator)
    labels[torch.rand(rows, 9, generator=generator) < 0.3] = IGNORE_INDEX
    return Batch(
        input_ids=torch.randint(0, 61, (rows, 9), generator=generator),
        labels=labels,
        num_target_tokens=int((labels != IGNORE_INDEX).sum()),
        num_target_bytes=num_bytes,
    )


def row_batch(rows: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        input_ids=torch.randint(0, 61, (rows, 9), generator=generator),
        labels=torch.randint(0, 4, (rows,), generator=generator),
        lengths=torch.randint(1, 10, (rows,), generator=generator),
        num_target_tokens=rows,
    )


def cut(batch: Batch, start: int, stop: int) -> Batch:
    labels = batch.labels[start:stop]
    return Batch(
        input_ids=batch.input_ids[start:stop],
        labels=labels,
        lengths=None if batch.lengths is None else batch.lengths[start:stop],
        num_target_tokens=int((labels != IGNORE_INDEX).sum()),
    )


@pytest.mark.parametrize("padding", [1, 64])
@pytest.mark.parametrize("tied", [True, False])
def test_causal_loss_and_gradients_equal_those_computed_from_the_logits(padding: int, tied: bool) -> None:
    objective = CausalLM(label_smoothing=0.1)
    model = build(ModelConfig(**SIZES, pad_vocab_to=padding, tie_embeddings=tied), objective.head(None))
    batch = token_batch(3)
    objective(model, batch).backward()
    fused_gradients = [param.grad for param in model.parameters()]
    model.zero_grad()
    logits = model(batch.input_ids)[..., :61]
    cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), label_smoothing=0.1, reduction="sum"
    ).backward()
    for gradient, param in zip(fused_gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, param.grad, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 6), max_size=2))
@pytest.mark.parametrize("objective", [CausalLM(z_loss=0.01), Classification(pooling="mean")])
def test_losses_and_sums_do_not_depend_on_how_a_batch_is_cut(objective: Any, cuts: list[int]) -> None:
    is_causal = isinstance(objective, CausalLM)
    model = build(ModelConfig(**SIZES), objective.head(None if is_causal else NAMES))
    batch = token_batch(6) if is_causal else row_batch(6)
    bounds = sorted([0, *cuts, 6])
    micro_batches = [cut(batch, a, b) for a, b in pairwise(bounds)]
    loss = sum(objective(model, micro_batch) for micro_batch in micro_batches)
    torch.testing.assert_close(loss, objective(model, batch))
    whole = objective.evaluate(model, batch)
    partial_sums = [objective.evaluate(model, micro_batch) for micro_batch in micro_batches]
    for name, value in whole.items():
        assert not value.requires_grad
        torch.testing.assert_close(
            torch.stack([sums[name] for sums in partial_sums]).sum(0), value, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("objective", [CausalLM(), Classification()])
@pytest.mark.parametrize("rows", [0, 2])
def test_a_batch_without_targets_adds_nothing(objective: Any, rows: int) -> None:
    is_causal = isinstance(objective, CausalLM)
    model = build(ModelConfig(**SIZES), objective.head(None if is_causal else NAMES))
    batch = Batch(
        input_ids=torch.zeros(rows, 5, dtype=torch.int64),
        labels=torch.full((rows, 5) if is_causal else (rows,), IGNORE_INDEX),
        num_target_tokens=0,
    )
    loss = objective(model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(param.grad is not None and not param.grad.any() for param in model.parameters())
    assert objective.metrics(objective.evaluate(model, batch))["loss"] == 0


def test_causal_metrics_equal_those_computed_from_the_logits() -> None:
    objective = CausalLM(z_loss=0.1, label_smoothing=0.1)
    model = build(ModelConfig(**SIZES, pad_vocab_to=64), objective.head(None))
    batch = token_batch(5, num_bytes=70)
    counts = batch.labels != IGNORE_INDEX
    logits, labels = model(batch.input_ids)[..., :61][counts], batch.labels[counts]
    loss = cross_entropy(logits, labels).item()
    assert objective.metrics(objective.evaluate(model, batch)) == pytest.approx(
        {
            "loss": loss,
            "perplexity": math.exp(loss),
            "accuracy": (logits.argmax(dim=1) == labels).float().mean().item(),
            "bits_per_byte": loss * batch.num_target_tokens / 70 / math.log(2),
        },
        rel=1e-5,
    )


def test_bits_per_byte_need_a_known_number_of_bytes() -> None:
    objective = CausalLM()
    sums = objective.evaluate(build(ModelConfig(**SIZES)), token_batch(2))
    assert "bits_per_byte" not in objective.metrics(sums)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
def test_classification_metrics_equal_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    labels, predictions = zip(*pairs, strict=True)

    def model(*_: object) -> Tensor:
        return torch.eye(4)[list(predictions)]

    batch = Batch(
        input_ids=torch.zeros(len(pairs), 1, dtype=torch.int64),
        labels=torch.tensor(labels),
        num_target_tokens=len(pairs),
    )
    objective = Classification()
    metrics = objective.metrics(objective.evaluate(model, batch))
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert metrics["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert metrics["loss"] == pytest.approx(cross_entropy(model(), batch.labels).item())


def test_each_objective_chooses_its_head_by_the_data() -> None:
    assert CausalLM().head(None) == LanguageModelHead()
    assert Classification(pooling="first").head(NAMES) == ClassificationHead(num_labels=4, pooling="first")
    with pytest.raises(ConfigError, match=r"objective\.type=classification needs labels"):
        Classification().head(None)
    with pytest.raises(ConfigError, match="cannot learn labels"):
        CausalLM().head(NAMES)


def test_the_type_chooses_the_objective() -> None:
    assert parse(ObjectiveConfig, {"type": "causal_lm", "z_loss": 1e-4}) == CausalLM(z_loss=1e-4)
    assert parse(ObjectiveConfig, {"type": "classification"}) == Classification()
