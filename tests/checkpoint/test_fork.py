"""A fork: a new run that begins with another's commit has the same state, and a life of its own."""

from math import prod
from pathlib import Path

import pytest
import torch
from support.small_commits import new_start, saved, snapshot

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.fork import fork_commit
from distft.checkpoint.manifest import MANIFEST
from distft.errors import CheckpointError


def state(path: str) -> dict[tuple[str, str], torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    return {
        (name, kind): checkpoint.read(name, kind, 0, prod(record.shape))
        for name, record in checkpoint.manifest.parameters.items()
        for kind in record.states
    }


def test_a_fork_has_the_state_and_progress_of_its_origin_and_another_run_id(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1, 2)
    path = fork_commit(str(tmp_path / "a"), 2, str(tmp_path / "b"))
    fork, origin = Checkpoint.open(path), Checkpoint.open(str(tmp_path / "a/step_00000002"))
    assert fork.find_damage() == []
    assert fork.manifest.progress == origin.manifest.progress
    assert fork.manifest.run_id != origin.manifest.run_id
    mine, theirs = state(path), state(origin.path)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_either_run_may_go_on_and_remove_its_commits(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1)
    path = fork_commit(str(tmp_path / "a"), 1, str(tmp_path / "b"))
    before = state(path)
    origin = new_start(tmp_path / "a")
    origin.save(snapshot(2))
    origin.save(snapshot(3))
    origin.prune(CheckpointConfig(keep_last=1))
    assert not (tmp_path / "a/step_00000001" / MANIFEST).exists()
    after = state(path)
    assert all(torch.equal(before[key], after[key]) for key in before)
    store = new_start(tmp_path / "b")
    assert store.find_latest_valid().damage == []
    store.save(snapshot(2))
    assert Checkpoint.open(str(tmp_path / "a/step_00000003")).find_damage() == []


def test_a_fork_that_was_cut_off_before_its_manifest_is_begun_again(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1)
    path = Path(fork_commit(str(tmp_path / "a"), 1, str(tmp_path / "b")))
    (path / MANIFEST).unlink()
    assert new_start(tmp_path / "b").find_latest_valid().checkpoint is None
    fork_commit(str(tmp_path / "a"), 1, str(tmp_path / "b"))
    assert Checkpoint.open(str(path)).find_damage() == []


def test_a_fork_needs_a_commit_and_a_new_directory(tmp_path: Path) -> None:
    saved(tmp_path / "a", 1)
    with pytest.raises(CheckpointError, match="step_00000005 has no"):
        fork_commit(str(tmp_path / "a"), 5, str(tmp_path / "b"))
    with pytest.raises(CheckpointError, match="a fork needs a new directory"):
        fork_commit(str(tmp_path / "a"), 1, str(tmp_path / "a"))
