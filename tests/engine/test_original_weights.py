"""Frozen weights in checkpoints are as they came, whatever the engine computes with."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engine_scenarios import CPU, PARTLY, Scenario, Training, fresh_source, run_alone, train_all
from support.rank_pool import run_ranks
from torch import Tensor

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.fragments import WEIGHT, UnloadedFragment
from distft.collectives import SingleProcess
from distft.engine.original_weights import OriginalWeights
from distft.topology import Topology

STEPS = 2
LOW = replace(PARTLY, precision="bf16")


def weights(state: dict[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    return {name: values for (name, kind), values in state.items() if kind == WEIGHT}


def require_frozen_as_they_came(found: dict[str, Tensor], scenario: Scenario) -> None:
    training = Training(scenario, Topology(), SingleProcess())
    source = fresh_source(training.shapes)
    frozen = training.shapes.keys() - training.trainable
    assert len(frozen) > 5
    for name in frozen:
        assert torch.equal(found[name], source.read(name, WEIGHT, 0, found[name].numel())), name


def test_an_engine_in_bf16_saves_frozen_weights_in_fp32_if_they_came_so() -> None:
    training = run_alone(LOW, STEPS)
    require_frozen_as_they_came(weights(training.whole_state()), LOW)
    kinds = {f.dtype for f in training.engine.fragments() if f.state == WEIGHT}
    assert kinds == {torch.float32}


@pytest.mark.ranks
def test_so_does_every_zero_stage() -> None:
    scenarios = [replace(LOW, stage=stage) for stage in (0, 1, 2, 3)]
    for results in run_ranks(train_all, 2, scenarios, STEPS, timeout_s=240):
        for (_, state), scenario in zip(results, scenarios, strict=True):
            require_frozen_as_they_came(weights(state), replace(scenario, stage=None))


def test_a_block_that_a_phase_freezes_and_another_thaws_keeps_its_fp32_weights(tmp_path: Path) -> None:
    state = run_alone(LOW, STEPS).whole_state()
    first = run_alone(LOW, STEPS)
    path = first.save(str(tmp_path / "first"))
    other = replace(LOW, trainable=("blocks.0.*",))
    second = Training(other, Topology(), SingleProcess(), Checkpoint.open(path))
    second.run(2 * STEPS)
    frozen = weights(second.whole_state())
    third = Training(LOW, Topology(), SingleProcess(), Checkpoint.open(second.save(str(tmp_path / "second"))))
    thawed = weights(third.whole_state())
    for name in first.trainable:
        assert not torch.equal(state[name, WEIGHT], state[name, WEIGHT].bfloat16().float()), name
        assert torch.equal(frozen[name], state[name, WEIGHT]), name
        assert torch.equal(thawed[name], state[name, WEIGHT]), name


class _LowSource:
    """The weights of a file in bf16."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._source = fresh_source(shapes)
        self.has, self.shape, self.updates = self._source.has, self._source.shape, self._source.updates

    def dtype(self, parameter: str, state: str) -> torch.dtype:  # noqa: ARG002
        return torch.bfloat16

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        return self._source.read(parameter, state, start, stop).bfloat16()


def test_a_weight_of_a_file_in_bf16_is_not_stored_twice_as_large_by_an_engine_in_fp32() -> None:
    shapes = {"a.weight": (5, 3)}
    source = _LowSource(shapes)
    originals = OriginalWeights()
    originals.load(source)
    held = source.read("a.weight", WEIGHT, 4, 11).float().to(CPU)
    fragment = originals.held("a.weight", 4, held)
    assert isinstance(fragment, UnloadedFragment)
    assert (fragment.start, fragment.stop, fragment.dtype) == (4, 11, torch.bfloat16)
    assert torch.equal(fragment.values.float(), held)
    same = originals.held("a.weight", 4, held.bfloat16())
    assert not isinstance(same, UnloadedFragment)
