"""Two ranks save, search and clean together, as threads of one process: one commit, and errors on both."""

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.small_commits import KEEP_ONE, saved, snapshot

from distft.checkpoint import store as store_module
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.snapshot import CheckpointSnapshot
from distft.checkpoint.steps import committed_steps
from distft.checkpoint.store import CheckpointStore, LatestValid
from distft.collectives import SingleProcess
from distft.errors import DistftError, StorageError, UnreachableError


class Threads(SingleProcess):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def all_gather(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()
        return found

    def gather(self, value: Any) -> Any:
        found = self.all_gather(value)
        return found if self.rank == 0 else None

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]


def on_two_ranks(work: Callable[[Threads], Any]) -> list[Any]:
    """What `work` returns, or the `DistftError` that it raises, on each rank."""
    slots, barrier = [None, None], threading.Barrier(2, timeout=20)

    def run(rank: int) -> Any:
        try:
            return work(Threads(rank, slots, barrier))
        except DistftError as error:
            return error
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, (0, 1)))


def share(step: int, rank: int) -> CheckpointSnapshot:
    whole = snapshot(step)
    moves = Fragment("moves", WEIGHT, rank, whole.fragments[0].values[rank : rank + 1])
    return replace(whole, fragments=[moves, whole.fragments[1]] if rank == 0 else [moves])


def test_two_ranks_write_one_commit_and_find_the_same(tmp_path: Path) -> None:
    def work(collectives: Threads) -> tuple[str, LatestValid, list[int]]:
        store = CheckpointStore(str(tmp_path), collectives)
        store.become_writer()
        for step in (1, 2, 3):
            path = store.save(share(step, collectives.rank))
        Path(store.path(3), MANIFEST).unlink(missing_ok=True)
        found = store.find_latest_valid()
        assert store.is_still_latest(found)
        store.resume_from(found)
        return path, found, store.prune(KEEP_ONE)

    (path, found, pruned), (other_path, also_found, other_pruned) = on_two_ranks(work)
    assert path == other_path == str(tmp_path / "step_00000003")
    assert found.checkpoint.step == also_found.checkpoint.step == 2
    assert (found.listed, found.damage, found.damaged_steps) == (
        also_found.listed,
        also_found.damage,
        also_found.damaged_steps,
    )
    assert (pruned, other_pruned) == ([1], [])
    checkpoint = Checkpoint.open(str(tmp_path / "step_00000002"))
    assert len([file for file in checkpoint.manifest.files if "/" not in file.name]) == 2
    assert checkpoint.find_damage() == []
    assert checkpoint.read("moves", WEIGHT, 0, 2).tolist() == [2.0, 0.5]


def test_a_damaged_manifest_is_damage_on_both_ranks(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step_00000002" / MANIFEST).write_bytes(b"{")
    found = on_two_ranks(lambda ranks: CheckpointStore(str(tmp_path), ranks).find_latest_valid())
    assert [one.checkpoint.step for one in found] == [1, 1]
    assert [one.damaged_steps for one in found] == [{2}, {2}]


@pytest.mark.parametrize("call", ["claim", "list", "read", "prepare", "write", "commit", "prune", "look"])
def test_an_error_on_one_rank_is_raised_on_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """As the class that the caller expects; the other rank names the failed one."""
    saved(tmp_path, 1, 2)
    failing_rank = 1 if call == "write" else 0

    def fail(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    def work(collectives: Threads) -> Any:
        store = CheckpointStore(str(tmp_path), collectives)
        is_failing = collectives.rank == failing_rank
        if is_failing and call in {"claim", "prune", "look"}:
            name = "acquire" if call == "claim" else "check"
            monkeypatch.setattr(store._fence, name, fail)
        if is_failing and call in {"prepare", "commit"}:
            monkeypatch.setattr(store, f"_{call}", fail)
        if call == "claim":
            return store.become_writer()
        if call in {"list", "read"}:
            return store.find_latest_valid()
        if call == "prune":
            return store.prune(KEEP_ONE)
        if call == "look":
            return store._raise_if_superseded()
        return store.save(share(3, collectives.rank))

    if call == "list":
        monkeypatch.setattr(store_module, "committed_steps", fail)
    if call == "read":
        monkeypatch.setattr(store_module, "read_manifest", fail)
    if call == "write":
        real = store_module.write_rank_file

        def fail_on_the_second(path: str, *arguments: Any, **options: Any) -> Any:
            return fail() if "rank_00001" in path else real(path, *arguments, **options)

        monkeypatch.setattr(store_module, "write_rank_file", fail_on_the_second)
    raised = on_two_ranks(work)
    if call == "read":  # a manifest that is not there any more: no commit is found
        assert [one.checkpoint for one in raised] == [None, None]
        assert [one.damaged_steps for one in raised] == [{1, 2}, {1, 2}]
        return
    expected = UnreachableError if call == "list" else StorageError
    assert [type(error) for error in raised] == [expected, expected]
    assert all("No space left on device" in str(error) for error in raised)
    assert str(raised[1 - failing_rank]).startswith(f"rank {failing_rank}: ")
    assert committed_steps(str(tmp_path)) == [1, 2]
