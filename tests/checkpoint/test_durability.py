"""What a power failure finds: each file's data, then its directory, then the name that makes it count.

Not of a tool's target: as after `cp`, the disk may still be writing it, and its source has not changed.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.engine_scenarios import PARTLY, run_alone
from support.faulty_disk import FaultyDisk

from distft import storage
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.store import CheckpointStore
from distft.checkpoint.writer_fence import WRITER_FILE
from distft.collectives import SingleProcess
from distft.storage.local import TEMPORARY_MARK


def _save(folder: Path) -> None:
    store = CheckpointStore(str(folder / "checkpoints"), SingleProcess())
    training = run_alone(PARTLY, 1)
    store.become_writer()
    store.save(training.take_snapshot())
    store.save(training.take_snapshot())  # replaces the commit
    store.prune(CheckpointConfig())


def _commit_bytes(folder: Path) -> None:
    storage.commit_bytes(folder / "a" / "b" / "file", b"content")


def _commit_unless_changed(folder: Path) -> None:
    path = folder / "a" / "file"
    assert storage.commit_unless_changed(path, b"content", expected=None, confirm=lambda: None)


COMMITS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "save": (_save, (MANIFEST, WRITER_FILE)),
    "commit_bytes": (_commit_bytes, ("file",)),
    "commit_unless_changed": (_commit_unless_changed, ("file",)),
}


@pytest.mark.parametrize("name", COMMITS)
def test_data_and_its_directories_are_synced_before_the_name_that_makes_them_count(
    tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    commit, counting_names = COMMITS[name]
    with FaultyDisk(folder) as disk:
        commit(folder)
    unsynced: set[str] = set()
    counted = 0
    for operation in disk.operations:
        directory = os.path.dirname(operation.path)  # noqa: PTH120
        if operation.kind == "fsync":
            unsynced.discard(operation.path)
        elif operation.kind == "write":
            unsynced.add(operation.path)
        elif operation.kind == "replace":
            drafts = {path for path in unsynced if path.startswith(f"{operation.path}{TEMPORARY_MARK}")}
            assert not drafts, f"{operation} before its content was synced"
            if os.path.basename(operation.path) in counting_names:  # noqa: PTH119
                assert not unsynced, f"{operation} while {unsynced} are not synced"
                counted += 1
            unsynced.add(directory)
        elif operation.kind == "mkdir":
            unsynced.add(directory)
    assert counted >= len(counting_names)
    assert not unsynced
