"""Crash safety of saves and pruning: whichever file operation fails, training continues exactly."""

import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from support.damage import flip_bit
from support.engine_scenarios import PARTLY, Scenario, Training, collectives_for, run_alone
from support.faulty_disk import Died, FaultyDisk, Operation, error_of, names_in, temporary_files_in
from support.rank_pool import RanksError, run_ranks

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.steps import committed_steps
from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.storage.local import TEMPORARY_MARK
from distft.topology import Topology

ALL = Scenario(micro_batch_size=8)
KEEP_ONE = CheckpointConfig(keep_last=1)


@dataclass(frozen=True)
class Case:
    """A process that finds the commits `before` on the disk, then saves, prunes, or both."""

    scenario: Scenario
    before: tuple[int, ...]  # committed steps
    saves: int | None  # the step that is saved; None: nothing
    prunes: bool = False
    damaged: int | None = None  # a step of `before`
    freezes_others: bool = False  # the steps of `before` have other frozen weights than the later ones

    @property
    def last_step(self) -> int:
        """The step that is saved after a recovery."""
        return max(*self.before, self.saves or 0, 0) + 1


CASES = {
    "first": Case(ALL, (), 1),
    "later": Case(ALL, (1, 2), 3),
    "over a damaged one": Case(ALL, (1, 2), 2, damaged=2),
    "frozen, first": Case(PARTLY, (), 1),
    "frozen, referring": Case(PARTLY, (1,), 2),
    "frozen, other ones": Case(PARTLY, (1,), 2, freezes_others=True),
    "pruning": Case(ALL, (1, 2, 3), None, prunes=True),
    "frozen, save and pruning": Case(PARTLY, (1, 2), 3, prunes=True, freezes_others=True),
}


@dataclass(frozen=True)
class Prepared:
    """The commits that a case finds on the disk, and the training whose state it saves."""

    case: Case
    root: Path
    old: Checkpoint | None  # the latest valid commit
    training: Training

    @property
    def old_step(self) -> int | None:
        return None if self.old is None else self.old.step


def prepare(case: Case, root: Path) -> Prepared:
    store = CheckpointStore(str(root), SingleProcess())
    scenario = replace(PARTLY, trainable=("blocks.0.*",)) if case.freezes_others else case.scenario
    earlier = run_alone(scenario, 0)
    for step in case.before:
        earlier.run(step)
        store.save(earlier.take_snapshot())
    if case.damaged is not None:
        flip_bit(Path(store.path(case.damaged), "rank_00000.safetensors"))
    old = CheckpointStore(str(root), SingleProcess()).find_latest_valid().checkpoint
    training = resume(case, old)
    if case.saves is not None:
        training.run(case.saves)
    return Prepared(case, root, old, training)


def resume(case: Case, checkpoint: Checkpoint | None) -> Training:
    return Training(case.scenario, Topology(), SingleProcess(), checkpoint)


def copy_to(prepared: Prepared, disk: Path) -> CheckpointStore:
    """Copy the commits to an empty disk; returns the store of a process that has just started there."""
    disk.mkdir()
    if prepared.root.exists():
        copytree(prepared.root, disk / "checkpoints")
    store = CheckpointStore(str(disk / "checkpoints"), SingleProcess())
    store.become_writer()
    store.resume_from(store.find_latest_valid())
    return store


def act(prepared: Prepared, store: CheckpointStore) -> None:
    """The save and pruning of the case."""
    if prepared.case.saves is not None:
        store.save(prepared.training.take_snapshot())
    if prepared.case.prunes:
        store.prune(KEEP_ONE)


def train_on(
    case: Case, store: CheckpointStore, checkpoint: Checkpoint | None, steps: list[int]
) -> list[float]:
    """Resume, train up to each of the steps, and save and prune there; returns the losses."""
    training = resume(case, checkpoint)
    losses = []
    for step in steps:
        losses += training.run(step)
        store.save(training.take_snapshot())
        store.prune(KEEP_ONE)
    return losses


@dataclass(frozen=True)
class Undisturbed:
    """A case without an accident: the expectation for what follows an accident."""

    prepared: Prepared
    operations: list[Operation]
    losses: dict[int | None, list[float]]  # step that is resumed from -> losses from there to the last step
    names: set[str]  # on the disk at the end


@dataclass(frozen=True)
class Recovery:
    """What a new process finds on a disk after an accident, and what it leaves there."""

    damaged_steps: set[int]  # committed, but damaged
    resumed_step: int | None
    damage: list[str]
    losses: list[float]
    final_step: int | None  # the latest valid one at the end
    final_damage: list[str]
    final_names: set[str]


def recover(case: Case, disk: Path) -> Recovery:
    """Start on the disk, resume, and train and save up to the last step."""
    store = CheckpointStore(str(disk / "checkpoints"), SingleProcess())
    damaged = {s for s in committed_steps(store.root) if Checkpoint.open(store.path(s)).find_damage()}
    store.become_writer()
    found = store.find_latest_valid()
    store.resume_from(found)
    steps = [*([case.saves] if case.saves else []), case.last_step]
    losses = train_on(case, store, found.checkpoint, steps)
    final = CheckpointStore(store.root, SingleProcess()).find_latest_valid()
    return Recovery(
        damaged_steps=damaged,
        resumed_step=None if found.checkpoint is None else found.checkpoint.step,
        damage=found.damage,
        losses=losses,
        final_step=None if final.checkpoint is None else final.checkpoint.step,
        final_damage=final.damage,
        final_names=plain_names_in(disk),
    )


def plain_names_in(disk: Path) -> set[str]:
    """The names on the disk, without those of the starts that wrote the files."""
    return {
        re.sub("_[0-9a-f]{8}(?=[./]|$)", "", re.sub(r"(step|frozen)_0{6}", r"\1_", name))
        for name in names_in(disk)
    }


def surviving_step(prepared: Prepared, done: list[Operation]) -> int | None:
    """The latest valid step after these operations: the saved one from the moment of its commit on."""
    manifest = f"step_{prepared.case.saves or 0:08d}/{MANIFEST}"
    is_committed = any(o.kind == "replace" and o.path.endswith(manifest) for o in done)
    return prepared.case.saves if is_committed else prepared.old_step


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: these tests cut no power. Whether fsync is called has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # noqa: ARG005


@pytest.fixture(scope="module", params=CASES)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(CASES[request.param], tmp_path_factory.mktemp("prepared") / "checkpoints")


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    case, disk = prepared.case, tmp_path_factory.mktemp("undisturbed") / "disk"
    store = copy_to(prepared, disk)
    with FaultyDisk(disk) as recorded:
        act(prepared, store)
    found = store.find_latest_valid()
    store.resume_from(found)
    assert found.checkpoint is not None
    losses: dict[int | None, list[float]] = {
        prepared.old_step: resume(case, prepared.old).run(case.last_step),
        found.checkpoint.step: resume(case, found.checkpoint).run(case.last_step),
    }
    train_on(case, store, found.checkpoint, [case.last_step])
    return Undisturbed(prepared, recorded.operations, losses, plain_names_in(disk))


@pytest.mark.parametrize("how", ["die", "torn"])
def test_a_process_that_dies_at_any_operation_loses_no_commit(
    undisturbed: Undisturbed, tmp_path: Path, how: Any
) -> None:
    prepared, operations = undisturbed.prepared, undisturbed.operations
    case = prepared.case
    assert len(operations) >= 6
    for number, operation in enumerate(operations):
        if how == "torn" and operation.kind != "write":
            continue
        accident = f"{how} at operation {number} of {len(operations)}: {operation}"
        disk = tmp_path / str(number)
        store = copy_to(prepared, disk)
        with FaultyDisk(disk, fail_at=number, how=how) as faulty, pytest.raises(Died):
            act(prepared, store)
        assert len(faulty.operations) == number, accident
        survivor = surviving_step(prepared, faulty.operations)
        recovery = recover(case, disk)
        assert recovery.damaged_steps <= {case.damaged}, accident
        assert recovery.resumed_step == survivor, accident
        assert len(recovery.damage) <= (case.damaged is not None), accident
        assert recovery.losses == undisturbed.losses[survivor], accident
        assert (recovery.final_step, recovery.final_damage) == (case.last_step, []), accident
        assert recovery.final_names == undisturbed.names, accident


@pytest.mark.parametrize("retries", [False, True], ids=["another process", "the same process"])
def test_a_disk_that_is_full_from_any_operation_on_loses_no_commit(
    undisturbed: Undisturbed, tmp_path: Path, retries: bool
) -> None:
    """Whether the process that failed tries again when space is free, or another one starts."""
    prepared, operations = undisturbed.prepared, undisturbed.operations
    case = prepared.case
    num_failed = 0
    for number, operation in enumerate(operations):
        disk = tmp_path / str(number)
        store = copy_to(prepared, disk)
        with FaultyDisk(disk, fail_at=number, how="full") as faulty:
            error = error_of(lambda store=store: act(prepared, store))  # type: ignore[misc]
        accident = f"full from operation {number} of {len(operations)} on: {operation}; {error}"
        assert error is None or re.search("no space left.*Free some space", str(error)), accident
        assert not temporary_files_in(disk), accident
        num_failed += error is not None
        done = faulty.operations
        if retries and error is not None:
            with FaultyDisk(disk) as healthy:
                act(prepared, store)
            done = done + healthy.operations
        survivor = surviving_step(prepared, done)
        recovery = recover(case, disk)
        assert recovery.damaged_steps <= {case.damaged}, accident
        assert recovery.resumed_step == survivor, accident
        assert len(recovery.damage) <= (case.damaged is not None), accident
        assert recovery.losses == undisturbed.losses[survivor], accident
        assert (recovery.final_step, recovery.final_damage) == (case.last_step, []), accident
        assert recovery.final_names == undisturbed.names, accident
    assert bool(num_failed) == (case.saves is not None)


def test_everything_is_synced_before_the_manifest_is_renamed_and_the_rename_after(
    undisturbed: Undisturbed,
) -> None:
    unsynced: set[str] = set()
    for operation in undisturbed.operations:
        if operation.kind == "fsync":
            unsynced.discard(operation.path)
            continue
        directory = str(Path(operation.path).parent)
        if operation.kind == "write":
            unsynced.add(operation.path)
        elif operation.kind in {"mkdir", "replace"}:
            if operation.kind == "replace":
                temporary = {
                    path for path in unsynced if path.startswith(f"{operation.path}{TEMPORARY_MARK}")
                }
                assert not temporary, f"{operation} before its content was synced"
            if operation.path.endswith(MANIFEST):
                assert not unsynced, f"{operation} while {unsynced} are not synced"
            unsynced.add(directory)
    assert not unsynced


def _audited_operations(topology: Topology, folder: str) -> tuple[Counter[str], Counter[str]]:  # noqa: ARG001
    """Operations of a save and a pruning: as the faulty disk counts them, and as the interpreter does."""
    prepared = prepare(CASES["frozen, save and pruning"], Path(folder) / "prepared")
    act(prepared, copy_to(prepared, Path(folder) / "once"))  # so that no import is counted below
    store = copy_to(prepared, Path(folder) / "disk")
    kinds = {"os.mkdir": "mkdir", "os.rename": "replace", "os.remove": "unlink", "os.rmdir": "rmdir"}
    kinds |= {"os.link": "link", "os.symlink": "symlink", "os.truncate": "truncate", "open": "open"}
    seen: Counter[str] = Counter()
    is_on = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if is_on and event in kinds and (event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            seen[kinds[event]] += 1

    sys.addaudithook(hook)
    with FaultyDisk(Path(folder) / "disk") as disk:
        is_on = True
        act(prepared, store)
        is_on = False
    return Counter(o.kind for o in disk.operations if o.kind not in {"write", "fsync"}), seen


@pytest.mark.ranks
def test_the_faulty_disk_counts_every_change_that_the_interpreter_audits(tmp_path: Path) -> None:
    ((counted, seen),) = run_ranks(_audited_operations, 1, str(tmp_path))
    assert counted == seen
    assert {"mkdir", "open", "replace", "unlink", "rmdir"} <= seen.keys()


def _save_and_be_killed(topology: Topology, root: str, rank: int, fraction: float) -> None:
    """Save steps 1 to 3; `rank` is killed in the last save, at an operation `fraction` of the way into it."""
    scenario = replace(PARTLY, stage=1, micro_batch_size=2)
    training = Training(scenario, topology, collectives_for(scenario, topology))
    store = CheckpointStore(root, training.collectives)
    number = None
    for step in (1, 2, 3):
        training.run(step)
        with FaultyDisk(Path(root), fail_at=number, how="kill") as disk:
            store.save(training.take_snapshot())
        if (step, topology.rank) == (2, rank):
            number = int(fraction * len(disk.operations))


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_at_a_random_operation_leaves_a_commit_to_resume_from(
    tmp_path: Path, rank: int
) -> None:
    fraction = random.SystemRandom().random() * 0.999
    with pytest.raises(RanksError, match="SIGKILL"):
        run_ranks(_save_and_be_killed, 2, str(tmp_path), rank, fraction)
    accident = f"killed {fraction:.4f} of the way"
    store = CheckpointStore(str(tmp_path), SingleProcess())
    found = store.find_latest_valid()
    assert found.checkpoint is not None, accident
    assert not found.damage, accident
    store.resume_from(found)
    training = Training(PARTLY, Topology(), SingleProcess(), found.checkpoint)
    expected = run_alone(PARTLY, 5).losses  # type: ignore[attr-defined]
    assert training.run(5) == pytest.approx(expected[found.checkpoint.step :], abs=1e-5), accident
    store.save(training.take_snapshot())
    store.prune(KEEP_ONE)
    assert not temporary_files_in(tmp_path), accident
    assert sorted(p.name for p in tmp_path.iterdir()) == ["frozen_00000001", "step_00000005"], accident
