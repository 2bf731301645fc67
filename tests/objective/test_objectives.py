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

from distft.collectives import SingleProcess
from distft.config import parse
from distft.data.batch import Batch
from distft.data.targets import IGNORE_INDEX, LABEL, NEXT_TOKEN
from distft.errors import ConfigError
from distft.model.heads import ClassificationHead, LanguageModelHead
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import Model, Objective, ObjectiveContext
from distft.objective.settings import CausalLM, Classification, ObjectiveConfig

NAMES = ("a", "b", "c", "d")
CONTEXT = ObjectiveContext(61, SingleProcess())


def token_batch(rows: int, seed: int = 0, num_bytes: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 61, (rows, 9), generator=generator)
    labels[torch.rand(rows, 9, generator=generator) < 0.3] = IGNORE_INDEX
    return Batch(
        input_ids=torch.randint(0, 61, (rows, 9), generator=generator),
        targets={NEXT_TOKEN: labels},
        num_targets={NEXT_TOKEN: int((labels != IGNORE_INDEX).sum())},
        num_target_bytes=num_bytes,
    )


def row_batch(rows: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        input_ids=torch.randint(0, 61, (rows, 9), generator=generator),
        targets={LABEL: torch.randint(0, 4, (rows,), generator=generator)},
        lengths=torch.randint(1, 10, (rows,), generator=generator),
        num_targets={LABEL: rows},
    )


def cut(batch: Batch, start: int, stop: int) -> Batch:
    targets = {name: values[start:stop] for name, values in batch.targets.items()}
    return Batch(
        input_ids=batch.input_ids[start:stop],
        targets=targets,
        lengths=None if batch.lengths is None else batch.lengths[start:stop],
        num_targets={name: int((values != IGNORE_INDEX).sum()) for name, values in targets.items()},
    )


def loss_sum(objective: Objective, model: Model, batch: Batch) -> Tensor:
    """The only term of the objective."""
    (term,) = objective.loss_sums(model, batch, CONTEXT).values()
    return term


def metrics(objective: Objective, model: Model, batch: Batch) -> dict[str, float]:
    return objective.metrics(objective.evaluate(model, batch, CONTEXT))


@pytest.mark.parametrize("padding", [1, 64])
@pytest.mark.parametrize("tied", [True, False])
def test_causal_loss_and_gradients_equal_those_computed_from_the_logits(padding: int, tied: bool) -> None:
    objective = CausalLM(label_smoothing=0.1)
    model = build(
        TransformerConfig(**SIZES, pad_vocab_to=padding, tie_embeddings=tied), objective.heads(None)
    )
    batch = token_batch(3)
    loss_sum(objective, model, batch).backward()
    fused_gradients = [param.grad for param in model.parameters()]
    model.zero_grad()
    logits = model.logits(batch.input_ids)[..., :61]
    cross_entropy(
        logits.flatten(0, 1), batch.targets[NEXT_TOKEN].flatten(), label_smoothing=0.1, reduction="sum"
    ).backward()
    for gradient, param in zip(fused_gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, param.grad, rtol=1e-4, atol=1e-4)


@given(st.lists(st.integers(0, 6), max_size=2))
@pytest.mark.parametrize("objective", [CausalLM(z_loss=0.01), Classification(pooling="mean")])
def test_losses_and_sums_do_not_depend_on_how_a_batch_is_cut(objective: Any, cuts: list[int]) -> None:
    is_causal = isinstance(objective, CausalLM)
    model = build(TransformerConfig(**SIZES), objective.heads(None if is_causal else NAMES))
    batch = token_batch(6) if is_causal else row_batch(6)
    bounds = sorted([0, *cuts, 6])
    micro_batches = [cut(batch, a, b) for a, b in pairwise(bounds)]
    loss = sum(loss_sum(objective, model, micro_batch) for micro_batch in micro_batches)
    torch.testing.assert_close(loss, loss_sum(objective, model, batch))
    whole = objective.evaluate(model, batch, CONTEXT)
    partial_sums = [objective.evaluate(model, micro_batch, CONTEXT) for micro_batch in micro_batches]
    for name, value in whole.items():
        assert not value.requires_grad
        torch.testing.assert_close(
            torch.stack([sums[name] for sums in partial_sums]).sum(0), value, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("objective", [CausalLM(), Classification()])
@pytest.mark.parametrize("rows", [0, 2])
def test_a_batch_without_targets_adds_nothing(objective: Any, rows: int) -> None:
    is_causal = isinstance(objective, CausalLM)
    model = build(TransformerConfig(**SIZES), objective.heads(None if is_causal else NAMES))
    batch = Batch(
        input_ids=torch.zeros(rows, 5, dtype=torch.int64),
        targets={NEXT_TOKEN: torch.full((rows, 5), IGNORE_INDEX)}
        if is_causal
        else {LABEL: torch.full((rows,), IGNORE_INDEX)},
        num_targets={NEXT_TOKEN: 0, LABEL: 0},
    )
    loss = loss_sum(objective, model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(param.grad is not None and not param.grad.any() for param in model.parameters())
    assert metrics(objective, model, batch)["loss"] == 0


def test_causal_metrics_equal_those_computed_from_the_logits() -> None:
    objective = CausalLM(z_loss=0.1, label_smoothing=0.1)
    model = build(TransformerConfig(**SIZES, pad_vocab_to=64), objective.heads(None))
    batch = token_batch(5, num_bytes=70)
    counts = batch.targets[NEXT_TOKEN] != IGNORE_INDEX
    logits, labels = model.logits(batch.input_ids)[..., :61][counts], batch.targets[NEXT_TOKEN][counts]
    loss = cross_entropy(logits, labels).item()
    assert metrics(objective, model, batch) == pytest.approx(
        {
            "loss": loss,
            "perplexity": math.exp(loss),
            "accuracy": (logits.argmax(dim=1) == labels).float().mean().item(),
            "bits_per_byte": loss * batch.num_targets[NEXT_TOKEN] / 70 / math.log(2),
        },
        rel=1e-5,
    )


def test_bits_per_byte_need_a_known_number_of_bytes() -> None:
    objective = CausalLM()
    sums = objective.evaluate(build(TransformerConfig(**SIZES)), token_batch(2), CONTEXT)
    assert "bits_per_byte" not in objective.metrics(sums)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20))
def test_classification_metrics_equal_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    labels, predictions = zip(*pairs, strict=True)

    def model(**_: object) -> dict[str, Tensor]:
        return {"classifier": torch.eye(4)[list(predictions)]}

    batch = Batch(
        input_ids=torch.zeros(len(pairs), 1, dtype=torch.int64),
        targets={LABEL: torch.tensor(labels)},
        num_targets={LABEL: len(pairs)},
    )
    objective = Classification()
    found = metrics(objective, model, batch)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert found["loss"] == pytest.approx(cross_entropy(model()["classifier"], batch.targets[LABEL]).item())


def test_each_objective_chooses_its_head_by_the_data() -> None:
    assert CausalLM().heads(None) == {"lm_head": LanguageModelHead()}
    assert Classification(pooling="first").heads(NAMES) == {
        "classifier": ClassificationHead(num_labels=4, pooling="first")
    }
    with pytest.raises(ConfigError, match=r"objective\.type=classification needs labels"):
        Classification().heads(None)
    with pytest.raises(ConfigError, match="cannot learn labels"):
        CausalLM().heads(NAMES)


def test_the_type_chooses_the_objective() -> None:
    assert parse(ObjectiveConfig, {"type": "causal_lm", "z_loss": 1e-4}) == CausalLM(z_loss=1e-4)
    assert parse(ObjectiveConfig, {"type": "classification"}) == Classification()
