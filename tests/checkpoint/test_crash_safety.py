"""Whatever file operation of a save is the last one, the last commit loads and training goes on from it."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from distributed import RanksError, run_ranks
from engine_scenarios import Scenario, Training, collectives_for, run_alone
from faulty_disk import Died, FaultyDisk, Operation, drafts_in, error_of, names_in

from distft.checkpoint.committed import Checkpoint, committed_steps
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.store import CheckpointConfig, CheckpointStore
from distft.cli.main import main
from distft.collectives import SingleProcess
from distft.errors import DistftError
from distft.storage.local import DRAFT_MARK
from distft.topology import Topology

ALL = Scenario(micro_batch_size=8)
PARTLY = Scenario(micro_batch_size=8, trainable=("blocks.1.*", "norm.weight"))
KEEP_ONE = CheckpointConfig(keep_last=1)


@dataclass(frozen=True)
class Case:
    """A process that has found `before` on the disk, and saves or deletes."""

    scenario: Scenario
    before: tuple[int, ...]  # committed steps
    saves: int | None  # the step that is saved; None: nothing
    retains: bool = False
    damaged: int | None = None  # a step of `before`
    thaw: bool = False  # the steps of `before` have other frozen weights than those after them

    @property
    def last_step(self) -> int:
        """The step of the save that comes after all that."""
        return max(*self.before, self.saves or 0, 0) + 1


CASES = {
    "first": Case(ALL, (), 1),
    "later": Case(ALL, (1, 2), 3),
    "over a damaged one": Case(ALL, (1, 2), 2, damaged=2),
    "frozen, first": Case(PARTLY, (), 1),
    "frozen, referring": Case(PARTLY, (1,), 2),
    "frozen, other ones": Case(PARTLY, (1,), 2, thaw=True),
    "retention": Case(ALL, (1, 2, 3), None, retains=True),
    "frozen, save and retention": Case(PARTLY, (1, 2), 3, retains=True, thaw=True),
}


class Prepared:
    """What a case finds on the disk, made once, and the state that it saves."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case = case
        self.root = root
        earlier = replace(PARTLY, trainable=("blocks.0.*",)) if case.thaw else case.scenario
        store = CheckpointStore(str(root), SingleProcess())
        training = run_alone(earlier, 0)
        for step in case.before:
            training.run(step)
            store.save(training.draft())
        if case.damaged is not None:
            file = Path(store.path(case.damaged), "rank_00000.safetensors")
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        self.old, _ = CheckpointStore(str(root), SingleProcess()).newest_good()
        self.old_step = None if self.old is None else self.old.step
        self.training = self.resume(self.old)
        if case.saves is not None:
            self.training.run(case.saves)

    def resume(self, checkpoint: Checkpoint | None) -> Training:
        return Training(self.case.scenario, Topology(), SingleProcess(), checkpoint)

    def on(self, disk: Path) -> CheckpointStore:
        """A copy of it on an empty disk, as a store that has looked at what is there."""
        disk.mkdir()
        if self.root.exists():
            shutil.copytree(self.root, disk / "checkpoints")
        store = CheckpointStore(str(disk / "checkpoints"), SingleProcess())
        store.newest_good()
        return store

    def act(self, store: CheckpointStore) -> None:
        if self.case.saves is not None:
            store.save(self.training.draft())
        if self.case.retains:
            store.retain(KEEP_ONE)


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here, so nothing waits for the disk; that it would is a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # noqa: ARG005


@pytest.fixture(scope="module", params=CASES)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return Prepared(CASES[request.param], tmp_path_factory.mktemp("prepared") / "checkpoints")


class Undisturbed:
    """A case without accidents, and what comes after it: the same must come after any accident."""

    def __init__(self, prepared: Prepared, disk: Path) -> None:
        self.prepared = prepared
        store = prepared.on(disk)
        with FaultyDisk(disk) as recorded:
            prepared.act(store)
        self.operations = recorded.operations
        checkpoint, _ = store.newest_good()
        assert checkpoint is not None
        self.losses = {checkpoint.step: prepared.resume(checkpoint).run(prepared.case.last_step)}
        if prepared.old_step not in self.losses:
            self.losses[prepared.old_step] = prepared.resume(prepared.old).run(prepared.case.last_step)
        self._go_on(store, checkpoint, [prepared.case.last_step])
        self.names = names_in(disk)

    def _go_on(self, store: CheckpointStore, checkpoint: Checkpoint | None, steps: list[int]) -> list[float]:
        training = self.prepared.resume(checkpoint)
        losses = []
        for step in steps:
            losses += training.run(step)
            store.save(training.draft())
            store.retain(KEEP_ONE)
        return losses

    def is_committed(self, done: list[Operation]) -> bool:
        manifest = f"step_{self.prepared.case.saves or 0:08d}/{MANIFEST}"
        return any(operation.kind == "replace" and operation.path.endswith(manifest) for operation in done)

    def check(self, disk: Path, done: list[Operation], said: str) -> None:
        """Whoever starts again after the operations `done` loses nothing, and tidies up."""
        case = self.prepared.case
        store = CheckpointStore(str(disk / "checkpoints"), SingleProcess())
        for step in committed_steps(store.root):
            assert step == case.damaged or Checkpoint.open(store.path(step)).faults() == [], said
        checkpoint, complaints = store.newest_good()
        step = case.saves if self.is_committed(done) else self.prepared.old_step
        assert (None if checkpoint is None else checkpoint.step) == step, said
        assert len(complaints) <= (case.damaged is not None), said
        losses = self._go_on(store, checkpoint, [*([case.saves] if case.saves else []), case.last_step])
        assert losses == self.losses[step], said
        newest, complaints = CheckpointStore(store.root, SingleProcess()).newest_good()
        assert newest is not None, said
        assert (newest.step, complaints) == (case.last_step, []), said
        assert names_in(disk) == self.names, said


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(prepared, tmp_path_factory.mktemp("undisturbed") / "disk")


@pytest.mark.parametrize("how", ["die", "torn"])
def test_a_writer_may_die_at_any_operation(undisturbed: Undisturbed, tmp_path: Path, how: Any) -> None:
    operations = undisturbed.operations
    assert len(operations) >= 6
    for number, operation in enumerate(operations):
        if how == "torn" and operation.kind != "write":
            continue
        disk = tmp_path / str(number)
        store = undisturbed.prepared.on(disk)
        with FaultyDisk(disk, fail_at=number, how=how) as faulty, pytest.raises(Died):
            undisturbed.prepared.act(store)
        said = f"{how} at operation {number} of {len(operations)}: {operation}"
        assert len(faulty.operations) == number, said
        undisturbed.check(disk, faulty.operations, said)


@pytest.mark.parametrize("goes_on", [False, True], ids=["another process", "the same process"])
def test_the_disk_may_be_full_from_any_operation_on(
    undisturbed: Undisturbed, tmp_path: Path, goes_on: bool
) -> None:
    prepared, operations = undisturbed.prepared, undisturbed.operations
    num_failed = 0
    for number, operation in enumerate(operations):
        disk = tmp_path / str(number)
        store = prepared.on(disk)
        with FaultyDisk(disk, fail_at=number, how="full") as faulty:
            error = error_of(lambda store=store: prepared.act(store))  # type: ignore[misc]
        said = f"full from operation {number} of {len(operations)} on: {operation}; {error}"
        assert error is None or re.search("no space left.*Free some space", str(error)), said
        assert not drafts_in(disk), said
        num_failed += error is not None
        done = faulty.operations
        if goes_on and error is not None:
            with FaultyDisk(disk) as healthy:
                prepared.act(store)
            done = done + healthy.operations
        undisturbed.check(disk, done, said)
    assert bool(num_failed) == (prepared.case.saves is not None)


def test_a_commit_counts_on_nothing_that_a_loss_of_power_could_take(undisturbed: Undisturbed) -> None:
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
                drafts = {path for path in unsynced if path.startswith(f"{operation.path}{DRAFT_MARK}")}
                assert not drafts, f"{operation} before its content was synced"
            if operation.path.endswith(MANIFEST):
                assert not unsynced, f"{operation} while {unsynced} are not synced"
            unsynced.add(directory)
    assert not unsynced


def _audited(topology: Topology, folder: str) -> tuple[Counter[str], Counter[str]]:  # noqa: ARG001
    """Operations of a save and a retention: as the faulty disk sees them, and as the interpreter does."""
    prepared = Prepared(CASES["frozen, save and retention"], Path(folder) / "prepared")
    prepared.act(prepared.on(Path(folder) / "once"))  # what is imported for it is imported now
    store = prepared.on(Path(folder) / "disk")
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
        prepared.act(store)
        is_on = False
    return Counter(o.kind for o in disk.operations if o.kind not in {"write", "fsync"}), seen


@pytest.mark.ranks
def test_no_change_of_the_disk_slips_by_the_faulty_disk(tmp_path: Path) -> None:
    ((counted, seen),) = run_ranks(_audited, 1, str(tmp_path))
    assert counted == seen
    assert {"mkdir", "open", "replace", "unlink", "rmdir"} <= seen.keys()


def _with_a_damaged_commit(root: Path) -> CheckpointStore:
    """Steps 2 and 4, of which the newer one is damaged."""
    store = CheckpointStore(str(root), SingleProcess())
    training = run_alone(ALL, 0)
    for step in (2, 4):
        training.run(step)
        store.save(training.draft())
    Path(store.path(4), "rank_00000.safetensors").write_bytes(b"")
    return store


def test_a_damaged_commit_pushes_no_good_one_out(tmp_path: Path) -> None:
    store = _with_a_damaged_commit(tmp_path)
    checkpoint, _ = store.newest_good()
    training = Training(ALL, Topology(), SingleProcess(), checkpoint)
    for step, gone, left in ((3, [2], {3, 4}), (5, [3], {5})):
        training.run(step)
        store.save(training.draft())
        assert store.retain(KEEP_ONE) == gone
        assert {int(path.name[-1]) for path in tmp_path.iterdir()} == left
        newest, _ = CheckpointStore(str(tmp_path), SingleProcess()).newest_good()
        assert newest is not None
        assert newest.step == step


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_pruning_keeps_the_newest_good_commit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    _with_a_damaged_commit(tmp_path)
    assert main(["checkpoint", "prune", str(tmp_path), "--keep-last", "1", *options]) == 0
    told = capsys.readouterr()
    assert ": no step " in told.out
    assert "2 stay" in told.out
    assert "step 4: " in told.err
    assert Checkpoint.open(str(tmp_path / "step_00000002")).faults() == []


# A tool's new directory


def _save_and_be_killed(topology: Topology, root: str, rank: int, share: float) -> None:
    """Save steps 1 to 3; one rank is killed at an operation of the last save, `share` of the way into it."""
    scenario = replace(PARTLY, stage=1, micro_batch_size=2)
    training = Training(scenario, topology, collectives_for(scenario, topology))
    store = CheckpointStore(root, training.collectives)
    number = None
    for step in (1, 2, 3):
        training.run(step)
        with FaultyDisk(Path(root), fail_at=number, how="kill") as disk:
            store.save(training.draft())
        if (step, topology.rank) == (2, rank):
            number = int(share * len(disk.operations))


@pytest.mark.ranks
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_at_a_random_operation_leaves_a_commit_to_go_on_from(tmp_path: Path, rank: int) -> None:
    share = random.SystemRandom().random() * 0.999
    with pytest.raises(RanksError, match="SIGKILL"):
        run_ranks(_save_and_be_killed, 2, str(tmp_path), rank, share)
    store = CheckpointStore(str(tmp_path), SingleProcess())
    checkpoint, complaints = store.newest_good()
    said = f"killed {share:.4f} of the way"
    assert checkpoint is not None, said
    assert not complaints, said
    training = Training(PARTLY, Topology(), SingleProcess(), checkpoint)
    expected = run_alone(PARTLY, 5).losses  # type: ignore[attr-defined]
    assert training.run(5) == pytest.approx(expected[checkpoint.step :], abs=1e-5), said
    store.save(training.draft())
    store.retain(KEEP_ONE)
    assert not drafts_in(tmp_path), said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["frozen_00000001", "step_00000005"], said


@contextmanager
def _tmpfs(directory: Path, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of its own; yields what changes its size. Skips the test where it cannot be had."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs the command mount")
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs (root): {mounted.stderr.strip()}")
    try:
        yield lambda size: subprocess.run(
            ["mount", "-o", f"remount,size={size}", str(directory)], check=True, capture_output=True
        )
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_a_file_system_that_is_really_full_keeps_the_last_commit(tmp_path: Path) -> None:
    training = run_alone(ALL, 1)
    path = training.save(str(tmp_path / "elsewhere"))
    num_bytes = sum(file.stat().st_size for file in Path(path).iterdir())
    with _tmpfs(tmp_path / "small", 3 * num_bytes // 2) as resize:
        root = tmp_path / "small" / "checkpoints"
        store = CheckpointStore(str(root), SingleProcess())
        store.save(training.draft())
        training.run(2)
        with pytest.raises(
            DistftError, match=r"step_00000002.*: no space left.*bytes are free.*Free some space"
        ):
            store.save(training.draft())
        assert not drafts_in(root)
        checkpoint, complaints = CheckpointStore(str(root), SingleProcess()).newest_good()
        assert checkpoint is not None
        assert (checkpoint.step, complaints) == (1, [])
        resize(10 * num_bytes)
        store.save(training.draft())
        assert store.retain(KEEP_ONE) == [1]
        assert Checkpoint.open(store.path(2)).faults() == []
        assert json.loads(Path(store.path(2), MANIFEST).read_bytes())["progress"]["step"] == 2
