"""Saving in the background, and frozen weights that are written once."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.damage import flip_bit
from support.engine_scenarios import Scenario, Training, collectives_for, run_alone
from support.rank_pool import run_ranks
from torch import Tensor

from distft.checkpoint.background import CheckpointSaver
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.snapshot import CheckpointSnapshot
from distft.checkpoint.staging import HostCopier, StagingArena
from distft.checkpoint.steps import committed_steps
from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.errors import CheckpointError
from distft.topology import Topology

PARTLY = Scenario(trainable=("blocks.1.*", "norm.weight"))


class LateCopier:
    """Copies only when it is waited for, as late as a GPU may; nothing may have changed by then."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.num_elements = 0  # copied so far
        self._pairs: Sequence[tuple[Tensor, Tensor]] = ()
        self._lock = threading.Lock()

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.calls.append("start")
        self._pairs = pairs

    def wait(self) -> None:
        self._copy()

    def hold_stream(self) -> None:
        self.calls.append("hold")
        self._copy()

    def _copy(self) -> None:
        with self._lock:
            for source, target in self._pairs:
                target.copy_(source)
                self.num_elements += source.numel()
            self._pairs = ()


class SlowStore(CheckpointStore):
    """Writes once `may_write` is set, or raises then."""

    def __init__(self, root: str, *, fails: bool = False) -> None:
        super().__init__(root, SingleProcess())
        self.may_write = threading.Event()
        self.fails = fails

    def save(self, snapshot: CheckpointSnapshot) -> str:
        assert self.may_write.wait(timeout=30)
        if self.fails:
            raise CheckpointError("the disk is gone")
        return super().save(snapshot)


def test_later_steps_do_not_change_the_state_that_is_written(tmp_path: Path) -> None:
    training = run_alone(Scenario(), 2)
    expected = training.whole_state()
    store = SlowStore(str(tmp_path))
    saver = CheckpointSaver(store, CheckpointConfig())
    saver.save(training.take_snapshot())
    training.run(4)
    assert not committed_steps(str(tmp_path))
    store.may_write.set()
    saver.wait()
    (saved,) = saver.collect()
    checkpoint = Checkpoint.open(saved.path)
    for (name, state), values in expected.items():
        assert torch.equal(checkpoint.read(name, state, 0, values.numel()), values), (name, state)
    assert saved.step == 2
    assert checkpoint.find_damage() == []


def test_a_device_that_copies_late_still_saves_the_state_of_its_step(tmp_path: Path) -> None:
    training = run_alone(Scenario(), 2)
    expected = training.whole_state()
    copier = LateCopier()
    store = SlowStore(str(tmp_path))
    saver = CheckpointSaver(store, CheckpointConfig(), copier)
    training.before_update = saver.hold_update
    copier.wait = lambda: None  # type: ignore[method-assign]  # the writer is later than the update
    saver.save(training.take_snapshot())
    assert copier.num_elements == 0  # the training thread waited for no copy
    training.run(4)
    assert copier.calls == ["start", "hold"]
    store.may_write.set()
    saver.wait()
    checkpoint = Checkpoint.open(saver.collect()[0].path)
    for (name, state), values in expected.items():
        assert torch.equal(checkpoint.read(name, state, 0, values.numel()), values), (name, state)


def test_the_writer_waits_until_the_copies_are_complete(tmp_path: Path) -> None:
    training = run_alone(Scenario(), 1)
    copier = LateCopier()
    store = CheckpointStore(str(tmp_path), SingleProcess())
    saver = CheckpointSaver(store, CheckpointConfig(), copier)
    saver.save(training.take_snapshot())
    saver.wait()
    assert copier.num_elements == sum(values.numel() for values in training.whole_state().values())
    assert Checkpoint.open(saver.collect()[0].path).find_damage() == []


def test_all_copies_lie_in_one_block_that_the_next_save_uses_again() -> None:
    training = run_alone(PARTLY, 1)
    arena = StagingArena(HostCopier())
    frozen = training.shapes.keys() - training.trainable
    addresses, blocks = [], []
    for step in (2, 3):
        training.run(step)
        originals = list(training.engine.fragments())
        staged = arena.stage(originals, is_constant=lambda fragment: fragment.parameter in frozen)
        for original, copy in zip(originals, staged, strict=True):
            assert torch.equal(original.values, copy.values)
            is_same_memory = original.values.data_ptr() == copy.values.data_ptr()
            assert is_same_memory == (original.parameter in frozen)
        copies = [f.values for f in staged if f.parameter not in frozen]
        blocks.append({values.untyped_storage().data_ptr() for values in copies})
        addresses.append([values.data_ptr() for values in copies])
        num_bytes = sum(values.numel() * values.element_size() for values in copies)
        assert num_bytes <= arena.num_bytes < num_bytes + 64 * len(copies)
    assert len(blocks[0]) == 1
    assert addresses[0] == addresses[1]


PIECE = st.tuples(st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))


@given(pieces=st.lists(PIECE, max_size=9))
def test_fragments_of_any_size_and_dtype_are_copied_apart_from_each_other(
    pieces: list[tuple[int, torch.dtype]],
) -> None:
    originals = [
        Fragment(f"p{number}", WEIGHT, 0, torch.randn(numel).to(dtype))
        for number, (numel, dtype) in enumerate(pieces)
    ]
    staged = StagingArena(HostCopier()).stage(originals, is_constant=lambda _: False)
    assert [copy.values.tolist() for copy in staged] == [f.values.tolist() for f in originals]
    assert [copy.values.dtype for copy in staged] == [dtype for _, dtype in pieces]


def test_saves_do_not_overlap_and_each_is_committed(tmp_path: Path) -> None:
    training = run_alone(Scenario(), 1)
    saver = CheckpointSaver(CheckpointStore(str(tmp_path), SingleProcess()), CheckpointConfig(keep_last=9))
    for step in (1, 2, 3):
        training.run(step)
        saver.save(training.take_snapshot())
        assert sum(thread.name == "distft-save" for thread in threading.enumerate()) <= 1
    saver.wait()
    assert [saved.step for saved in saver.collect()] == [1, 2, 3]
    assert committed_steps(str(tmp_path)) == [1, 2, 3]


def test_a_failure_of_the_writer_is_raised_once_by_the_next_call(tmp_path: Path) -> None:
    training = run_alone(Scenario(), 1)
    store = SlowStore(str(tmp_path), fails=True)
    saver = CheckpointSaver(store, CheckpointConfig())
    saver.save(training.take_snapshot())
    store.may_write.set()
    with pytest.raises(CheckpointError, match="the disk is gone"):
        saver.wait()
    saver.wait()
    assert not saver.has_failed
    saver.save(training.take_snapshot())
    with pytest.raises(CheckpointError, match="the disk is gone"):
        saver.save(training.take_snapshot())


def test_without_background_a_save_is_committed_when_it_returns(tmp_path: Path) -> None:
    training = run_alone(Scenario(), 1)
    store = CheckpointStore(str(tmp_path), SingleProcess())
    saver = CheckpointSaver(store, CheckpointConfig(in_background=False))
    saver.save(training.take_snapshot())
    assert committed_steps(str(tmp_path)) == [1]
    (saved,) = saver.collect()
    assert saved.stall_s == saved.write_s > 0


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_frozen_weights_are_written_once_and_kept_as_long_as_a_commit_needs_them(tmp_path: Path) -> None:
    training = run_alone(PARTLY, 1)
    store = CheckpointStore(str(tmp_path), SingleProcess())
    saver = CheckpointSaver(store, CheckpointConfig(keep_last=1))
    for step in (1, 2, 3):
        training.run(step)
        saver.save(training.take_snapshot())
        saver.wait()
    assert _names(tmp_path) == ["frozen_00000001", "step_00000003"]
    state = training.whole_state()
    num_frozen = sum(v.numel() for (name, _), v in state.items() if name not in training.trainable)
    num_trainable = sum(v.numel() for (name, _), v in state.items() if name in training.trainable)
    assert _bytes(tmp_path / "frozen_00000001") == pytest.approx(4 * num_frozen, rel=0.2)
    assert _bytes(tmp_path / "step_00000003") == pytest.approx(4 * num_trainable, rel=0.2)
    checkpoint = Checkpoint.open(store.path(3))
    assert checkpoint.find_damage() == []
    for (name, kind), values in state.items():
        assert torch.equal(checkpoint.read(name, kind, 0, values.numel()), values), (name, kind)


@pytest.mark.parametrize("in_background", [True, False])
def test_frozen_weights_are_not_even_read_once_a_commit_has_them(tmp_path: Path, in_background: bool) -> None:
    training = run_alone(PARTLY, 1)
    copier = LateCopier()
    store = CheckpointStore(str(tmp_path), SingleProcess())
    saver = CheckpointSaver(store, CheckpointConfig(in_background=in_background), copier)
    saver.save(training.take_snapshot())
    saver.wait()
    training.run(2)
    snapshot = training.take_snapshot()
    # A meta tensor has no values: who reads or copies one fails.
    unreadable = [
        fragment
        if fragment.parameter in training.trainable
        else replace(fragment, values=fragment.values.to("meta"))
        for fragment in snapshot.fragments
    ]
    before = copier.num_elements
    saver.save(replace(snapshot, fragments=unreadable))
    saver.wait()
    checkpoint = Checkpoint.open(store.path(2))
    assert checkpoint.find_damage() == []
    num_trainable = 0
    for (name, kind), values in training.whole_state().items():
        assert torch.equal(checkpoint.read(name, kind, 0, values.numel()), values), (name, kind)
        num_trainable += values.numel() if name in training.trainable else 0
    assert copier.num_elements - before == (num_trainable if in_background else 0)


def test_after_a_resume_commits_refer_to_the_existing_frozen_weights(tmp_path: Path) -> None:
    run_alone(PARTLY, 1).save(str(tmp_path))
    resumed = Training(PARTLY, Topology(), SingleProcess(), Checkpoint.open(str(tmp_path / "step_00000001")))
    store = CheckpointStore(str(tmp_path), SingleProcess())
    store.resume_from(store.find_latest_valid())
    resumed.run(2)
    store.save(resumed.take_snapshot())
    assert _names(tmp_path) == ["frozen_00000001", "step_00000001", "step_00000002"]


def test_different_frozen_weights_are_written_again(tmp_path: Path) -> None:
    run_alone(PARTLY, 1).save(str(tmp_path))
    store = CheckpointStore(str(tmp_path), SingleProcess())
    found = store.find_latest_valid()
    store.resume_from(found)
    later = Training(Scenario(trainable=("blocks.0.*",)), Topology(), SingleProcess(), found.checkpoint)
    later.run(2)
    store.save(later.take_snapshot())
    assert _names(tmp_path) == ["frozen_00000001", "frozen_00000002", "step_00000001", "step_00000002"]
    store.prune(CheckpointConfig(keep_last=1))
    assert _names(tmp_path) == ["frozen_00000002", "step_00000002"]
    assert Checkpoint.open(store.path(2)).find_damage() == []


def test_damage_of_frozen_weights_is_found(tmp_path: Path) -> None:
    path = run_alone(PARTLY, 1).save(str(tmp_path))
    file = tmp_path / "frozen_00000001" / "rank_00000.safetensors"
    flip_bit(file)
    (damage,) = Checkpoint.open(path).find_damage()
    assert "frozen_00000001/rank_00000.safetensors is damaged" in damage
    file.unlink()
    (damage,) = Checkpoint.open(path).find_damage()
    assert "frozen_00000001/rank_00000.safetensors is missing" in damage


def _save_in_background(topology: Topology, scenario: Scenario, root: str) -> list[float]:
    training = Training(scenario, topology, collectives_for(scenario, topology))
    store = CheckpointStore(root, training.collectives.with_new_group())
    saver = CheckpointSaver(store, CheckpointConfig(keep_last=9))
    losses = []
    for step in range(1, 6):
        losses += training.run(step)
        saver.save(training.take_snapshot())
    saver.wait()
    return losses


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_save_in_the_background_while_they_train(tmp_path: Path, stage: int) -> None:
    scenario = Scenario(stage=stage, trainable=("blocks.*", "norm.weight"))
    run_ranks(_save_in_background, 2, scenario, str(tmp_path))
    assert committed_steps(str(tmp_path)) == [1, 2, 3, 4, 5]
    assert [name for name in _names(tmp_path) if name.startswith("frozen_")] == ["frozen_00000001"]
    straight = run_alone(Scenario(trainable=scenario.trainable), 3).whole_state()
    checkpoint = Checkpoint.open(str(tmp_path / "step_00000003"))
    assert checkpoint.find_damage() == []
    for (name, state), values in straight.items():
        assert torch.allclose(checkpoint.read(name, state, 0, values.numel()), values, atol=2e-6), name
