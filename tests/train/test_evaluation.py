"""Evaluation: each row once, on any number of ranks, without dropout, and not twice at the end of a run."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import build

from distft.collectives import SingleProcess
from distft.data.batch import RaggedArray
from distft.data.feed import Feed
from distft.data.labelled_rows import LabelledRows
from distft.model.config import ClassificationHead, ModelConfig
from distft.objective.classification import Classification
from distft.objective.interface import ObjectiveContext
from distft.train.evaluation import evaluate
from distft.train.schedule import TrainingSchedule

VOCAB_SIZE = 11
CPU = torch.device("cpu")


class Share(SingleProcess):
    """One of several ranks, whose sums are collected instead of being added to those of the others."""

    def __init__(self, rank: int, world_size: int, sums: dict[int, list[torch.Tensor]]) -> None:
        self.rank = self.dp_rank = rank
        self.world_size = self.dp_world_size = world_size
        self._sums = sums

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        self._sums.setdefault(self.rank, []).append(value)
        return value


def rows(num_rows: int) -> LabelledRows:
    source = np.random.default_rng(3)
    texts = [source.integers(0, VOCAB_SIZE, source.integers(1, 7)).tolist() for _ in range(num_rows)]
    return LabelledRows(RaggedArray(texts), source.integers(0, 3, num_rows))


def classifier(dropout: float) -> Any:
    sizes = {"vocab_size": VOCAB_SIZE, "max_seq_len": 8, "d_model": 8, "num_layers": 1, "num_heads": 2}
    config = ModelConfig.model_validate({**sizes, "init_std": 0.5, "dropout": dropout})
    return build(config, {"classifier": ClassificationHead(num_labels=3)})


def metrics_of(model: Any, feed: Feed, collectives: SingleProcess, **options: Any) -> dict[str, float]:
    context = ObjectiveContext(VOCAB_SIZE, collectives)
    options = {"micro_batch_size": 2, "seq_len": 8, "device": CPU, **options}
    return evaluate(model, model, Classification(), feed, context=context, **options)


@given(num_rows=st.integers(1, 6), world_size=st.integers(1, 9), micro_batch_size=st.integers(1, 4))
def test_every_row_counts_once_also_where_the_share_of_a_rank_is_empty(
    num_rows: int, world_size: int, micro_batch_size: int
) -> None:
    model, feed = classifier(0.0), Feed.for_evaluation(rows(num_rows))
    sums: dict[int, list[torch.Tensor]] = {}
    for rank in range(world_size):
        metrics_of(model, feed, Share(rank, world_size, sums), micro_batch_size=micro_batch_size)
    loss, confusion = (sum(sums[rank][i] for rank in sums) for i in (0, 1))
    assert int(torch.as_tensor(confusion).sum()) == num_rows
    expected = torch.zeros((), dtype=torch.float64)
    for index in range(num_rows):  # the plainest way: a row at a time
        batch = feed.batch(index, index + 1)
        logits = model(**batch.model_inputs)["classifier"].double()
        expected += torch.nn.functional.cross_entropy(logits, batch.targets["label"]).detach()
    torch.testing.assert_close(torch.as_tensor(loss), expected, rtol=1e-6, atol=1e-6)


def test_dropout_is_off_in_evaluation_and_on_again_after_it() -> None:
    with_dropout, without = classifier(0.5).train(), classifier(0.0)
    without.load_state_dict(with_dropout.state_dict())
    feed = Feed.for_evaluation(rows(8))
    found = [metrics_of(with_dropout, feed, SingleProcess()) for _ in range(2)]
    assert found[0] == found[1] == metrics_of(without, feed, SingleProcess())
    assert with_dropout.training


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_label_smoothing_counts_in_training_and_not_in_evaluation(smoothing: float) -> None:
    """Against the definition: a share of the probability goes to all classes alike (arXiv:1512.00567)."""
    model, feed = classifier(0.0), Feed.for_evaluation(rows(5))
    batch = feed.batch(0, 5)
    log_probabilities = model(**batch.model_inputs)["classifier"].log_softmax(1)
    target = torch.nn.functional.one_hot(batch.targets["label"], 3) * (1 - smoothing) + smoothing / 3
    expected = -(target * log_probabilities).sum()
    objective = Classification(label_smoothing=smoothing)
    context = ObjectiveContext(VOCAB_SIZE, SingleProcess())
    torch.testing.assert_close(objective.loss_sums(model, batch, context)["label"], expected)
    plain = Classification().evaluate(model, batch, context)["loss_sum"]
    torch.testing.assert_close(objective.evaluate(model, batch, context)["loss_sum"], plain)


@pytest.mark.parametrize(
    ("total_steps", "every_steps", "at_end", "due"),
    [
        (433, 36, True, [*range(36, 432, 36), 433]),  # 432 is a step before the end
        (433, 36, False, list(range(36, 433, 36))),
        (436, 36, True, [*range(36, 433, 36), 436]),
        (12, 4, True, [4, 8, 12]),
        (3, 1, True, [1, 2, 3]),
        (5, None, True, [5]),
        (5, None, False, []),
    ],
)
def test_a_run_is_not_evaluated_again_right_after_an_evaluation(
    total_steps: int, every_steps: int | None, at_end: bool, due: list[int]
) -> None:
    schedule = TrainingSchedule(
        total_steps=total_steps,
        lr_at=lambda _: 1.0,
        log_every_steps=1,
        max_skipped_in_a_row=1,
        max_skipped_share=1.0,
        save_every_steps=None,
        evaluate_every_steps=every_steps,
        evaluate_at_end=at_end,
    )
    assert [step for step in range(1, total_steps + 1) if schedule.is_evaluation_due(step)] == due
