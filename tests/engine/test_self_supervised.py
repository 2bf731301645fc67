"""Self-supervised objectives: a step of ranks at a ZeRO stage is that of one process on the whole batch."""

from collections.abc import Sequence
from typing import Any, Literal

import pytest
from support.engine_scenarios import SEQ_LEN, VOCAB_SIZE, Scenario
from support.first_step import Outcome, first_step
from support.mixtures import TokenRows, largest_difference
from support.rank_pool import run_ranks

from distft.config import parse
from distft.data.dataset import DataContext
from distft.data.feed import Feed
from distft.objective.interface import Objective
from distft.objective.settings import ObjectiveConfig
from distft.topology import Topology

NUM_SEQUENCES = 7
OBJECTIVES: dict[str, dict[str, Any]] = {
    "masked_lm": {"type": "masked_lm", "mask_rate": 0.3},
    "next_sentence": {"type": "next_sentence", "masking": {"mask_rate": 0.3}},
    "sentence_order": {"type": "sentence_order"},
    "prefix_lm": {"type": "prefix_lm"},
    "span_corruption": {"type": "span_corruption", "noise_density": 0.3},
    "fill_in_the_middle": {"type": "causal_lm", "fim": {"rate": 0.7}},
}
CAUSAL = ("prefix_lm", "span_corruption", "fill_in_the_middle")
MARKS = {"<fim_prefix>": 50, "<fim_suffix>": 51, "<fim_middle>": 52}
DATA = DataContext(
    seq_len=SEQ_LEN,
    vocab_size=VOCAB_SIZE,
    encode=lambda _: [],
    tokenizer_fingerprint="",
    global_batch_size=NUM_SEQUENCES,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    piece_id=MARKS.get,
)


def scenario_of(name: str, **settings: Any) -> Scenario:
    attention: Literal["causal", "bidirectional"] = "causal" if name in CAUSAL else "bidirectional"
    return Scenario(
        global_batch_size=NUM_SEQUENCES, attention=attention, max_grad_norm=None, dropout=0.2, **settings
    )


def step_by_engine(topology: Topology, cases: Sequence[tuple[str, Scenario]]) -> list[Outcome]:
    outcomes = []
    for name, scenario in cases:
        objective: Objective = parse(ObjectiveConfig, OBJECTIVES[name])
        feed = objective.transform_feed(Feed.for_training(TokenRows(), seed=5, shuffle=True), DATA, seed=11)
        assert isinstance(feed, Feed)
        outcomes.append(first_step(scenario, objective, objective.heads(None), feed, topology, 9))
    return outcomes


@pytest.mark.ranks
def test_ranks_take_the_step_of_one_process_on_the_whole_batch() -> None:
    """With dropout. Stages 1 and 3 train in the whole runs of objective/test_self_supervised_runs.py."""
    whole = [(name, scenario_of(name, micro_batch_size=NUM_SEQUENCES)) for name in OBJECTIVES]
    expected = step_by_engine(Topology(), whole)
    cases = [(name, scenario_of(name, stage=stage)) for stage in (0, 2) for name in OBJECTIVES]
    for outcomes in run_ranks(step_by_engine, 2, cases, timeout_s=240):
        for case, found, one in zip(cases, outcomes, expected * 2, strict=True):
            assert found.loss == pytest.approx(one.loss, abs=1e-6), case
            assert max(float(gradient.abs().max()) for gradient in one.gradient.values()) > 1e-3
            assert largest_difference(found.gradient, one.gradient) <= 1e-6, case
