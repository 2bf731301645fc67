"""Commit, damage, fall-back, retention."""

import json
from pathlib import Path

import pytest
import torch
from engine_scenarios import Scenario, run_alone
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from distft.checkpoint.committed import Checkpoint, committed_steps, find_checkpoint
from distft.checkpoint.manifest import MANIFEST, Manifest
from distft.checkpoint.store import CheckpointConfig, CheckpointStore, expired
from distft.collectives import SingleProcess
from distft.errors import CheckpointError, SupersededError


def _three_saves(root: Path) -> CheckpointStore:
    training = run_alone(Scenario(), 0)
    for step in (1, 2, 3):
        training.run(step)
        training.save(str(root))
    return CheckpointStore(str(root), SingleProcess())


def test_the_newest_commit_is_found_from_the_run_its_checkpoints_and_itself(tmp_path: Path) -> None:
    store = _three_saves(tmp_path / "run" / "checkpoints")
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", store.path(3)):
        assert find_checkpoint(str(path)).step == 3
    with pytest.raises(CheckpointError, match="No committed checkpoint at"):
        find_checkpoint(str(tmp_path / "elsewhere"))


def test_a_directory_without_a_manifest_does_not_count(tmp_path: Path) -> None:
    store = _three_saves(tmp_path)
    Path(store.path(3), MANIFEST).unlink()
    newest, complaints = store.newest_good()
    assert newest is not None
    assert newest.step == 2
    assert complaints == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "mix"])
def test_damage_is_named_and_the_commit_before_serves(tmp_path: Path, damage: str) -> None:
    store = _three_saves(tmp_path)
    file = Path(store.path(3), "rank_00000.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-10])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        Path(store.path(3), MANIFEST).write_text('{"format": "distft-ch')
    elif damage == "mix":
        file.write_bytes(Path(store.path(2), file.name).read_bytes())
    newest, complaints = store.newest_good()
    assert newest is not None
    assert newest.step == 2
    assert len(complaints) == 1
    assert complaints[0].startswith("step 3: ")
    assert (MANIFEST if damage == "manifest" else file.name) in complaints[0]


def test_a_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    store = _three_saves(tmp_path)
    path = Path(store.path(3), MANIFEST)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(CheckpointError, match="format_version=99"):
        Checkpoint.open(store.path(3))


def test_rank_files_are_plain_safetensors(tmp_path: Path) -> None:
    training = run_alone(Scenario(), 2)
    path = training.save(str(tmp_path))
    tensors = load_file(Path(path, "rank_00000.safetensors"))
    state = training.whole_state()
    assert {key: values.numel() for key, values in tensors.items()} == {
        f"{name}/{kind}/0": values.numel() for (name, kind), values in state.items()
    }
    assert all(torch.equal(tensors[f"{name}/{kind}/0"], values) for (name, kind), values in state.items())


def test_a_manifest_survives_its_own_bytes(tmp_path: Path) -> None:
    manifest = Checkpoint.open(run_alone(Scenario(), 1).save(str(tmp_path))).manifest
    assert Manifest.from_bytes(manifest.to_bytes(), "here") == manifest


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = _three_saves(tmp_path)
    Path(store.path(3), "rank_00007.safetensors").write_bytes(b"left by a larger world that was killed")
    training = run_alone(Scenario(), 3)
    training.save(str(tmp_path))
    assert sorted(p.name for p in Path(store.path(3)).iterdir()) == [MANIFEST, "rank_00000.safetensors"]
    newest, complaints = store.newest_good()
    assert newest is not None
    assert newest.step == 3
    assert not complaints


def test_retention_deletes_old_commits_and_old_drafts(tmp_path: Path) -> None:
    store = _three_saves(tmp_path)
    (tmp_path / "step_00000000").mkdir()  # a draft of a killed save
    (tmp_path / "step_00000009").mkdir()  # and one that may be in the making
    assert store.retain(CheckpointConfig(keep_last=1)) == [1, 2]
    assert committed_steps(str(tmp_path)) == [3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000009"]


@given(
    steps=st.sets(st.integers(1, 100), max_size=20),
    keep_last=st.integers(1, 5),
    grid=st.none() | st.integers(1, 10),
)
def test_retention_keeps_the_last_ones_and_the_grid(
    steps: set[int], keep_last: int, grid: int | None
) -> None:
    gone = expired(sorted(steps), CheckpointConfig(keep_last=keep_last, keep_every_steps=grid))
    kept = steps - set(gone)
    assert set(sorted(steps)[-keep_last:]) <= kept
    assert all(step in kept for step in steps if grid and step % grid == 0)
    assert len(kept) <= keep_last + sum(1 for step in steps if grid and step % grid == 0)


def test_a_start_that_another_has_taken_over_from_writes_nothing_more(tmp_path: Path) -> None:
    """As a rank that its cluster took for dead, or a run that was submitted twice."""
    training = run_alone(Scenario(), 1)
    first, second = (CheckpointStore(str(tmp_path), SingleProcess()) for _ in range(2))
    first.claim()
    first.save(training.draft())
    second.claim()
    training.run(2)
    second.save(training.draft())
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    training.run(3)
    with pytest.raises(SupersededError, match="Another start of this run"):
        first.save(training.draft())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    second.save(training.draft())
    assert committed_steps(str(tmp_path)) == [1, 2, 3]
