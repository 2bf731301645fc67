"""R-Drop: two passes of each row with other dropout, whose predictions are to agree."""

from typing import Any

import numpy as np
import pytest
import torch
from support.mixtures import labelled_rows
from support.tiny_models import SIZES, build
from torch import Tensor
from torch.nn import functional

from distft.collectives import SingleProcess
from distft.data.batch import Batch
from distft.data.dataset import DataContext
from distft.data.feed import Feed
from distft.data.targets import LABEL
from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig
from distft.objective.classification import R_DROP, Classification
from distft.objective.interface import ObjectiveContext

NAMES = ("a", "b", "c")
CONTEXT = ObjectiveContext(61, SingleProcess())
DATA = DataContext(
    seq_len=12, vocab_size=61, encode=lambda _: [], tokenizer_fingerprint="none", label_names=NAMES
)


def feed_of(objective: Classification, *, training: bool = True) -> Feed:
    rows = labelled_rows()
    feed = Feed.for_training(rows, seed=0, shuffle=True, label_names=NAMES)
    if not training:
        feed = Feed.for_evaluation(rows, label_names=NAMES)
    transformed = objective.transform_feed(feed, DATA, seed=1)
    assert isinstance(transformed, Feed)
    return transformed


def model_of(objective: Classification, dropout: float = 0.3) -> Any:
    return build(TransformerConfig(**SIZES, dropout=dropout), objective.heads(NAMES)).train()


def by_hand(model: Any, objective: Classification, batch: Batch) -> tuple[Tensor, Tensor]:
    """Cross entropy and divergence, summed over rows, each pass of a row by itself."""
    losses, divergences = [], []
    for row in range(0, len(batch.input_ids), 2):
        length = int(batch.lengths[row])
        passes = [
            model(batch.input_ids[row : row + 1, :length], dropout_keys=batch.dropout_keys[i : i + 1])
            for i in (row, row + 1)
        ]
        p, q = (output["classifier"][0] for output in passes)
        label = batch.targets[LABEL][row]
        losses.append(
            (functional.cross_entropy(p, label, label_smoothing=objective.label_smoothing)) / 2
            + functional.cross_entropy(q, label, label_smoothing=objective.label_smoothing) / 2
        )
        p, q = p.softmax(0), q.softmax(0)
        divergences.append((p * (p / q).log()).sum() / 2 + (q * (q / p).log()).sum() / 2)
    return torch.stack(losses).sum(), torch.stack(divergences).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_and_its_gradient_are_those_of_the_paper(smoothing: float) -> None:
    objective = Classification(r_drop=2.0, label_smoothing=smoothing, pooling="mean")
    model, batch = model_of(objective), feed_of(objective).batch(0, 7).for_step(5)
    sums = objective.loss_sums(model, batch, CONTEXT)
    weights = objective.term_weights(0)
    sum(weights[name] * value for name, value in sums.items()).backward()
    gradient = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    loss, divergence = by_hand(model, objective, batch)
    (loss + 2.0 * divergence).backward()
    torch.testing.assert_close(sums[LABEL], loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums[R_DROP], divergence, rtol=1e-5, atol=1e-6)
    assert float(divergence.detach()) > 0.01
    for name, param in model.named_parameters():
        torch.testing.assert_close(gradient[name], param.grad, rtol=1e-4, atol=1e-5)


def test_a_row_counts_once_and_passes_twice_in_training_alone() -> None:
    objective = Classification(r_drop=2.0)
    batch = feed_of(objective).batch(3, 6).for_step(5)
    assert objective.num_targets(batch) == {LABEL: 3, R_DROP: 3}
    assert batch.rows_per_sequence == 2
    assert len(set(batch.dropout_keys.tolist())) == 6
    assert batch.targets[LABEL][::2].tolist() == batch.targets[LABEL][1::2].tolist()
    held_out = feed_of(objective, training=False).batch(3, 6)
    assert len(held_out.input_ids) == 3
    assert objective.num_targets(held_out) == {LABEL: 3, R_DROP: 3}


def test_a_row_that_stands_for_none_adds_nothing() -> None:
    objective = Classification(r_drop=2.0, pooling="mean")
    model = model_of(objective)
    batch = feed_of(objective).batch(3, 3).for_step(5)
    sums = objective.loss_sums(model, batch, CONTEXT)
    assert objective.num_targets(batch) == {LABEL: 0, R_DROP: 0}
    sum(sums.values()).backward()
    assert all(float(value.detach()) == 0 for value in sums.values())
    assert all(not param.grad.any() for param in model.parameters() if param.grad is not None)


def test_equal_passes_leave_the_plain_loss() -> None:
    """Without dropout, which `check_model` refuses."""
    objective, plain = Classification(r_drop=2.0, pooling="mean"), Classification(pooling="mean")
    model = model_of(objective, dropout=0.0)
    sums = objective.loss_sums(model, feed_of(objective).batch(0, 7).for_step(5), CONTEXT)
    expected = plain.loss_sums(model, feed_of(plain).batch(0, 7).for_step(5), CONTEXT)
    torch.testing.assert_close(sums[LABEL], expected[LABEL])
    assert float(sums[R_DROP].detach()) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ConfigError, match=r"r_drop=2 with model\.dropout=0"):
        objective.check_model(TransformerConfig(**SIZES))
    objective.check_model(TransformerConfig(**SIZES, dropout=0.1))
    objective.check_model(TransformerConfig(**SIZES, neftune_alpha=5.0))


def test_metrics_name_both_terms() -> None:
    objective = Classification(r_drop=2.0)
    assert objective.term_metrics({LABEL: 1.0, R_DROP: 0.5}, 0) == {"label/loss": 1.0, "r_drop/loss": 0.5}
    assert np.isclose(objective.term_weights(3)[R_DROP], 2.0)
