"""Objectives for unlabelled rows: any engine, world size and cut train what one process trains at once."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from support.engine_scenarios import SEQ_LEN, VOCAB_SIZE, collectives_for
from support.mixtures import LABELS, MixtureCase, MixtureTraining, labelled_rows
from support.rank_pool import run_ranks
from torch import Tensor

from distft.config import parse
from distft.data.batch import RaggedArray
from distft.data.dataset import DataContext
from distft.data.feed import Feed, StreamFeed
from distft.data.labelled_rows import LabelledRows, RowTargets
from distft.data.mixture import Interleaving
from distft.data.targets import ROW
from distft.model.heads import Heads
from distft.objective.mixture import Mixture
from distft.objective.settings import ObjectiveConfig
from distft.topology import Topology
from distft.train.step import StepResult

NUM_STEPS = 4
PARTS: list[dict[str, Any]] = [
    {
        "type": "pseudo_label",
        "threshold": [[0, 0.3], [3, 0.36]],
        "per_class": True,
        "align": True,
        "class_shares": None,
    },
    {"type": "mean_teacher", "loss": "mse"},
    {"type": "consistency", "min_confidence": 0.34, "temperature": 0.5},
    {"type": "entropy"},
]


def unlabelled_rows(num_rows: int = 17) -> LabelledRows:
    source = np.random.default_rng(4)
    texts = [source.integers(0, VOCAB_SIZE, source.integers(1, SEQ_LEN)).tolist() for _ in range(num_rows)]
    return LabelledRows(RaggedArray(texts), RowTargets(ROW, np.zeros(num_rows, np.int64)))


@dataclass(frozen=True, kw_only=True)
class SemiSupervisedCase(MixtureCase):
    """Labelled rows, and unlabelled ones for an objective with these settings."""

    part: Mapping[str, Any] = field(default_factory=dict)
    dropout: float = 0.2

    @property
    def objective(self) -> Mixture:
        raw = {
            "type": "mixture",
            "parts": {
                "topic": {"objective": {"type": "classification", "pooling": "mean"}},
                "texts": {"objective": {**self.part, "head": "topic"}, "weight": [[0, 0.5], [2, 2.0]]},
            },
        }
        objective: Mixture = parse(ObjectiveConfig, raw)
        return objective

    @property
    def heads(self) -> Heads:
        return self.objective.heads(LABELS)

    def feed(self) -> StreamFeed:
        streams = {
            "topic": Feed.for_training(labelled_rows(), seed=6, shuffle=True, label_names=LABELS["topic"]),
            "texts": Feed.for_training(unlabelled_rows(), seed=5, shuffle=True),
        }
        size = self.global_batch_size if self.alternate else 1
        order = Interleaving((1.0, 2.0), block_size=size)
        feed = StreamFeed(streams, order, steps_of=size if self.alternate else None)
        context = DataContext(
            seq_len=SEQ_LEN,
            vocab_size=VOCAB_SIZE,
            encode=lambda _: [],
            tokenizer_fingerprint="none",
            label_names=LABELS,
        )
        transformed = self.objective.transform_feed(feed, context, 1)
        assert isinstance(transformed, StreamFeed)
        return transformed


class SemiSupervisedTraining(MixtureTraining):
    """With the objective's state, and the engine's averaged weights."""

    def __init__(self, case: SemiSupervisedCase, topology: Topology) -> None:
        super().__init__(case, topology, collectives_for(case.scenario, topology))
        state = {name: torch.tensor(v) for name, v in self.objective.initial_state(case.heads).items()}
        self.context = replace(self.context, state=state, averaged_weights=self.engine.averaged_weights)

    def train(self, to_step: int) -> list[StepResult]:
        results = []
        while self.step < to_step:
            self.context = replace(self.context, step=self.step)
            results += super().train(self.step + 1)
        return results


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    sums: list[list[float]]  # for metrics of training, such as confident rows
    num_tokens: list[int]
    weights: Mapping[str, Tensor]
    state: Mapping[str, Tensor]


def train_all(topology: Topology, cases: list[SemiSupervisedCase]) -> list[Outcome]:
    outcomes = []
    for case in cases:
        training = SemiSupervisedTraining(case, topology)
        results = training.train(NUM_STEPS)
        losses = [float(result.loss) for result in results]
        sums = [result.sums.tolist() for result in results]
        num_tokens = [int(result.num_tokens) for result in results]
        weights = {
            name: values for (name, kind), values in training.whole_state().items() if kind == "weight"
        }
        outcomes.append(Outcome(losses, sums, num_tokens, weights, training.context.state))
        training.engine.close()
    return outcomes


def require_equal(found: Outcome, expected: Outcome, what: object) -> None:
    assert found.losses == pytest.approx(expected.losses, abs=3e-6), what
    assert (found.sums, found.num_tokens) == (expected.sums, expected.num_tokens), what
    for kind in ("weights", "state"):
        for name, values in getattr(expected, kind).items():
            torch.testing.assert_close(
                getattr(found, kind)[name], values, rtol=0, atol=3e-6, msg=f"{what} {name}"
            )


def cases_of(**changes: Any) -> list[SemiSupervisedCase]:
    return [
        SemiSupervisedCase(part=part, alternate=alternate, **changes)
        for part in PARTS
        for alternate in (False, True)
    ]


@functools.cache
def at_once() -> list[Outcome]:
    """Each step as one micro-batch of one process."""
    return train_all(Topology(), cases_of(micro_batch_size=7))


def test_each_objective_changes_what_is_learnt() -> None:
    assert len({tuple(outcome.losses) for outcome in at_once()}) == len(cases_of())


def test_the_sums_count_confident_rows_of_the_global_batch() -> None:
    shares = []
    for case, outcome in zip(cases_of(), at_once(), strict=True):
        names = case.objective.training_sum_names
        if case.part["type"] not in {"pseudo_label", "consistency"}:
            assert names == []
            continue
        assert names == ["texts/num_confident", "texts/num_rows"]
        assert all(0 <= confident <= rows <= 7 for confident, rows in outcome.sums)
        confident, rows = map(sum, zip(*outcome.sums, strict=True))
        assert 0 < confident <= rows
        shares.append(confident / rows)
        metrics = case.objective.training_metrics(dict(zip(names, (confident, rows), strict=True)))
        assert metrics == {"texts/confident_share": confident / rows}
        assert case.objective.training_metrics(dict.fromkeys(names, 0.0)) == {}
    assert min(shares) < 1  # of three classes the largest always has a third, which is above some thresholds


def test_cuts_do_not_change_a_step() -> None:
    cases = cases_of(micro_batch_size=2)
    for case, found, expected in zip(cases, train_all(Topology(), cases), at_once(), strict=True):
        require_equal(found, expected, case)


@pytest.mark.ranks
@pytest.mark.parametrize(("world_size", "stages"), [(2, (0, 1, 2)), (4, (3,))])
def test_ranks_and_engines_train_the_same(world_size: int, stages: tuple[int, ...]) -> None:
    cases = [case for stage in stages for case in cases_of(stage=stage)]
    expected = at_once() * len(stages)
    for outcomes in run_ranks(train_all, world_size, cases, timeout_s=240):
        for case, found, one in zip(cases, outcomes, expected, strict=True):
            require_equal(found, one, case)
