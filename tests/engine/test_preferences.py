"""Preference losses: any engine, world size and cut have the loss and the gradient of one whole batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from support.engine_scenarios import FREEING, SEQ_LEN, VOCAB_SIZE, Scenario, Training, collectives_for
from support.rank_pool import run_ranks
from torch import Tensor

from distft.config import parse
from distft.data.added_target import RowsWithTarget
from distft.data.batch import RaggedArray
from distft.data.dataset import DataContext
from distft.data.feed import Feed
from distft.data.preferences_rows import PreferenceRows
from distft.data.targets import REFERENCE_LOGP
from distft.objective.interface import Objective, ObjectiveContext
from distft.objective.settings import ObjectiveConfig
from distft.topology import Topology
from distft.train.step import train_step

NUM_STEPS = 3
LOSSES: list[dict[str, Any]] = [
    {"loss": "dpo", "beta": 0.3, "label_smoothing": 0.1},
    {"loss": "dpo", "beta": 0.3, "sft_weight": 0.2},
    {"loss": "ipo", "beta": 0.2},
    {"loss": "orpo", "beta": 0.5},
    {"loss": "orpo", "beta": 0.5, "sft_on_prompt": True},
]


@dataclass(frozen=True, kw_only=True)
class Case:
    loss: int  # of `LOSSES`
    stage: int | None = None
    micro_batch_size: int = 8

    @property
    def scenario(self) -> Scenario:
        zero = FREEING if self.stage == 3 else {}
        # Plain SGD: its update is the gradient, so that weights show gradients and not just their signs.
        return Scenario(
            stage=self.stage,
            micro_batch_size=self.micro_batch_size,
            optimizer={"type": "sgd", "peak_lr": 0.1, "momentum": 0.0, "max_grad_norm": None},
            zero=zero,
        )

    @property
    def objective(self) -> Objective:
        objective: Objective = parse(ObjectiveConfig, {"type": "preference", **LOSSES[self.loss]})
        return objective

    def feed(self) -> Feed:
        """Pairs whose rows have 2 to `SEQ_LEN` + 1 tokens, with numbers in place of a reference's."""
        source, rows, prompt_lengths = np.random.default_rng(4), [], []
        for _ in range(2 * 19):
            length = int(source.choice([2, 3, SEQ_LEN + 1]))
            rows.append(source.integers(0, VOCAB_SIZE, length).tolist())
            prompt_lengths.append(int(source.integers(1, length)))
        pairs = PreferenceRows(RaggedArray(rows), np.array(prompt_lengths))
        values = -3 * source.random((19, 2), dtype=np.float32)
        feed = Feed.for_training(RowsWithTarget(pairs, REFERENCE_LOGP, values), seed=6, shuffle=True)
        context = DataContext(
            seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE, encode=lambda _: [], tokenizer_fingerprint="none"
        )
        transformed = self.objective.transform_feed(feed, context, 1)
        assert isinstance(transformed, Feed)
        return transformed


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    weights: Mapping[str, Tensor]


def train(topology: Topology, case: Case) -> Outcome:
    collectives = collectives_for(case.scenario, topology)
    training, objective, feed = Training(case.scenario, topology, collectives), case.objective, case.feed()
    context, losses = ObjectiveContext(VOCAB_SIZE, collectives), []
    for step in range(NUM_STEPS):
        micro_batches = training.plan.micro_batches(step, collectives.rank)
        result = train_step(
            training.engine,
            [feed.batch(micro.start, micro.stop).for_step(None) for micro in micro_batches],
            loss_sums=lambda model, batch: objective.loss_sums(model, batch, context),
            num_targets=objective.num_targets,
            weights=objective.term_weights(step),
            group_lr=lambda group: 0.1 * group.lr_scale,
        )
        losses.append(float(result.loss))
    weights = {name: values for (name, state), values in training.whole_state().items() if state == "weight"}
    training.engine.close()
    return Outcome(losses, weights)


def train_all(topology: Topology, cases: list[Case]) -> list[Outcome]:
    return [train(topology, case) for case in cases]


def require_equal(found: Outcome, expected: Outcome, case: Case) -> None:
    assert found.losses == pytest.approx(expected.losses, abs=1e-6), case
    for name, values in expected.weights.items():
        torch.testing.assert_close(
            found.weights[name],
            values,
            rtol=0,
            atol=1e-6,
            msg=lambda m: f"{case} {name}: {m}",  # noqa: B023
        )


@pytest.fixture(scope="module")
def whole() -> list[Outcome]:
    """Of each loss: one process, the whole batch at once."""
    return [train(Topology(), Case(loss=index)) for index in range(len(LOSSES))]


def test_a_batch_of_8_pairs_is_8_batches_of_1(whole: list[Outcome]) -> None:
    for index, expected in enumerate(whole):
        assert expected.losses[-1] != pytest.approx(expected.losses[0], abs=1e-3)
        for micro_batch_size in (1, 3):
            case = Case(loss=index, micro_batch_size=micro_batch_size)
            require_equal(train(Topology(), case), expected, case)


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "world_size"), [(1, 2), (2, 2), (3, 4)])
def test_a_batch_of_8_pairs_is_that_of_all_ranks(stage: int, world_size: int, whole: list[Outcome]) -> None:
    cases = [
        Case(loss=index, stage=stage, micro_batch_size=1 if index % 2 else 8 // world_size)
        for index in range(len(LOSSES))
    ]
    for found in run_ranks(train_all, world_size, cases, timeout_s=240):
        for case, outcome in zip(cases, found, strict=True):
            require_equal(outcome, whole[case.loss], case)
