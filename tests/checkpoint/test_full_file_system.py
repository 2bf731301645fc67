"""A file system that is really full: the last commit stays, and the next save works when there is room."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.engine_scenarios import Scenario, run_alone
from support.faulty_disk import temporary_files_in

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.errors import DistftError

ALL = Scenario(micro_batch_size=8)
KEEP_ONE = CheckpointConfig(keep_last=1)


@contextmanager
def _tmpfs(directory: Path, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """Mount a file system of this size; yields a function that resizes it. Skips without the right."""
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


def test_a_real_full_file_system_keeps_the_last_commit(tmp_path: Path) -> None:
    training = run_alone(ALL, 1)
    path = training.save(str(tmp_path / "elsewhere"))
    num_bytes = sum(file.stat().st_size for file in Path(path).iterdir())
    with _tmpfs(tmp_path / "small", 3 * num_bytes // 2) as resize:
        root = tmp_path / "small" / "checkpoints"
        store = CheckpointStore(str(root), SingleProcess())
        store.save(training.take_snapshot())
        training.run(2)
        with pytest.raises(
            DistftError, match=r"step_00000002.*: no space left.*bytes are free.*Free some space"
        ):
            store.save(training.take_snapshot())
        assert not temporary_files_in(root)
        found = CheckpointStore(str(root), SingleProcess()).find_latest_valid()
        assert found.checkpoint is not None
        assert (found.checkpoint.step, found.damage) == (1, [])
        resize(10 * num_bytes)
        store.save(training.take_snapshot())
        assert store.prune(KEEP_ONE) == [1]
        assert Checkpoint.open(store.path(2)).find_damage() == []
        assert json.loads(Path(store.path(2), MANIFEST).read_bytes())["progress"]["step"] == 2
