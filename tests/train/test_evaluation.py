"""Evaluation: each row once, on any number of ranks, without dropout, and not twice at the end of a run."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import PrivateAttr
from support.tiny_models import build

from distft.collectives import SingleProcess
from distft.data.batch import AnyBatch, Batch, RaggedArray
from distft.data.feed import Feed
from distft.data.labelled_rows import LabelledRows
from distft.data.targets import IGNORE_INDEX
from distft.model.heads import ClassificationHead
from distft.model.transformer_config import TransformerConfig
from distft.objective.classification import Classification
from distft.objective.interface import ObjectiveContext, only_batch
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

    def differentiable_gather(self, rows: torch.Tensor) -> torch.Tensor:
        return self.all_reduce_sum(rows)


def rows(num_rows: int) -> LabelledRows:
    source = np.random.default_rng(3)
    texts = [source.integers(0, VOCAB_SIZE, source.integers(1, 7)).tolist() for _ in range(num_rows)]
    return LabelledRows(RaggedArray(texts), source.integers(0, 3, num_rows))


def classifier(dropout: float) -> Any:
    sizes = {"vocab_size": VOCAB_SIZE, "max_seq_len": 8, "d_model": 8, "num_layers": 1, "num_heads": 2}
    config = TransformerConfig.model_validate({**sizes, "init_std": 0.5, "dropout": dropout})
    return build(config, {"classifier": ClassificationHead(num_labels=3)})


def metrics_of(model: Any, feed: Feed, collectives: SingleProcess, **options: Any) -> dict[str, float]:
    context = ObjectiveContext(VOCAB_SIZE, collectives)
    options = {"micro_batch_size": 2, "seq_len": 8, "device": CPU, "objective": Classification(), **options}
    return evaluate(model, model, options.pop("objective"), feed, context=context, **options)


class Recording(Classification):
    """Records what it is called with; its metrics are the labels in the order of the data."""

    _seen: list[Batch] = PrivateAttr(default_factory=list)

    @property
    def per_row(self) -> frozenset[str]:
        return frozenset({"labels"})

    def evaluate(self, model: Any, batch: AnyBatch, context: ObjectiveContext) -> dict[str, torch.Tensor]:
        batch = only_batch(batch)
        assert context.vocab_size == VOCAB_SIZE
        assert not torch.is_grad_enabled()
        assert not model.training
        self._seen.append(batch)
        labels = batch.targets["label"]
        return {
            "labels": labels if labels.is_meta else labels[labels != IGNORE_INDEX],
            "num_rows": (labels != IGNORE_INDEX).sum(),
        }

    def metrics(self, sums: Any) -> dict[str, Any]:
        return dict(sums)


@given(num_rows=st.integers(1, 6), world_size=st.integers(1, 9), micro_batch_size=st.integers(1, 4))
def test_every_row_counts_once_also_where_the_share_of_a_rank_is_empty(
    num_rows: int, world_size: int, micro_batch_size: int
) -> None:
    model, feed = classifier(0.0), Feed.for_evaluation(rows(num_rows))
    sums: dict[int, list[torch.Tensor]] = {}
    for rank in range(world_size):
        metrics_of(model, feed, Share(rank, world_size, sums), micro_batch_size=micro_batch_size)
    loss, by_class = (sum(sums[rank][i] for rank in sums) for i in (0, 1))
    assert int(torch.as_tensor(by_class)[1].sum()) == num_rows
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


@given(num_rows=st.integers(1, 9), world_size=st.integers(1, 4), micro_batch_size=st.integers(1, 4))
def test_outputs_with_a_row_for_each_target_are_put_together_in_the_order_of_the_data(
    num_rows: int, world_size: int, micro_batch_size: int
) -> None:
    model, data, objective = classifier(0.0), rows(num_rows), Recording()
    labels = data.batch(np.arange(num_rows)).targets["label"].tolist()
    found: dict[int, list[torch.Tensor]] = {}
    told: list[int] = []
    for rank in range(world_size):
        metrics_of(
            model,
            Feed.for_evaluation(data),
            Share(rank, world_size, found),
            objective=objective,
            micro_batch_size=micro_batch_size,
            on_progress=told.append,
        )
    assert torch.cat([found[rank][1] for rank in found]).tolist() == labels
    assert sum(int(found[rank][0]) for rank in found) == num_rows
    assert sum(told) == num_rows
    assert max(told) <= micro_batch_size
    assert len(told) == len(objective._seen)


@pytest.mark.parametrize(("max_sequences", "num_counted"), [(1, 1), (4, 4), (5, 5), (9, 5), (None, 5)])
def test_of_the_rows_at_most_max_sequences_count(max_sequences: int | None, num_counted: int) -> None:
    feed = Feed.for_evaluation(rows(5))
    found: Any = metrics_of(
        classifier(0.0), feed, SingleProcess(), objective=Recording(), max_sequences=max_sequences
    )
    assert found["labels"].tolist() == feed.batch(0, num_counted).targets["label"].tolist()


def test_batches_are_put_on_the_device() -> None:
    objective = Recording()
    feed = Feed.for_evaluation(rows(5))
    metrics_of(classifier(0.0), feed, SingleProcess(), objective=objective, device=torch.device("meta"))
    assert {batch.input_ids.device.type for batch in objective._seen} == {"meta"}


@pytest.mark.parametrize("is_training", [True, False])
def test_the_model_is_left_as_it_was_also_after_an_error(is_training: bool) -> None:
    model, feed = classifier(0.5).train(is_training), Feed.for_evaluation(rows(3))

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        metrics_of(model, feed, SingleProcess(), on_progress=interrupt)
    assert model.training is is_training
    metrics_of(model, feed, SingleProcess())
    assert model.training is is_training


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
