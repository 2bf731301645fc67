"""Commits, damage and fallback, pruning, fencing."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.damage import flip_bit
from support.engine_scenarios import Scenario, run_alone

from distft.checkpoint.committed import Checkpoint, find_checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.manifest import MANIFEST, Manifest
from distft.checkpoint.retention import steps_to_prune
from distft.checkpoint.steps import committed_steps
from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.errors import CheckpointError, SupersededError


def _three_saves(root: Path) -> CheckpointStore:
    training = run_alone(Scenario(), 0)
    for step in (1, 2, 3):
        training.run(step)
        training.save(str(root))
    return CheckpointStore(str(root), SingleProcess())


def test_the_newest_commit_is_found_by_the_path_of_the_run_its_checkpoints_or_itself(
    tmp_path: Path,
) -> None:
    store = _three_saves(tmp_path / "run" / "checkpoints")
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", store.path(3)):
        assert find_checkpoint(str(path)).step == 3
    with pytest.raises(CheckpointError, match="No committed checkpoint at"):
        find_checkpoint(str(tmp_path / "elsewhere"))


def test_a_directory_without_a_manifest_does_not_count(tmp_path: Path) -> None:
    store = _three_saves(tmp_path)
    Path(store.path(3), MANIFEST).unlink()
    found = store.find_latest_valid()
    assert found.checkpoint is not None
    assert found.checkpoint.step == 2
    assert found.damage == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "mix"])
def test_damage_is_named_and_the_commit_before_it_is_the_latest_valid(tmp_path: Path, damage: str) -> None:
    store = _three_saves(tmp_path)
    file = Path(store.path(3), "rank_00000.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        flip_bit(file, len(data) // 2)
    elif damage == "truncate":
        file.write_bytes(data[:-10])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        Path(store.path(3), MANIFEST).write_text('{"format": "distft-ch')
    elif damage == "mix":
        file.write_bytes(Path(store.path(2), file.name).read_bytes())
    found = store.find_latest_valid()
    assert found.checkpoint is not None
    assert found.checkpoint.step == 2
    assert found.damaged_steps == {3}
    (message,) = found.damage
    assert message.startswith("step 3: ")
    assert (MANIFEST if damage == "manifest" else file.name) in message


def test_a_search_changes_neither_the_store_nor_the_disk(tmp_path: Path) -> None:
    store = _three_saves(tmp_path)
    Path(store.path(3), "rank_00000.safetensors").unlink()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = store.find_latest_valid()
    assert store.valid_steps() == [1, 2, 3]
    store.resume_from(found)
    assert store.valid_steps() == [1, 2]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_newer_format_version_is_refused(tmp_path: Path) -> None:
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


def test_a_manifest_is_the_same_after_a_round_trip_through_bytes(tmp_path: Path) -> None:
    manifest = Checkpoint.open(run_alone(Scenario(), 1).save(str(tmp_path))).manifest
    assert Manifest.from_bytes(manifest.to_bytes(), "here") == manifest


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = _three_saves(tmp_path)
    Path(store.path(3), "rank_00007.safetensors").write_bytes(b"of a killed save with more ranks")
    training = run_alone(Scenario(), 3)
    store.save(training.take_snapshot())
    assert Path(store.path(3), "rank_00000.safetensors").exists()  # until the new commit is complete
    store.prune(CheckpointConfig(keep_last=3))
    names = sorted(p.name for p in Path(store.path(3)).iterdir())
    assert names == [MANIFEST, Checkpoint.open(store.path(3)).manifest.files[0].name]
    found = store.find_latest_valid()
    assert found.checkpoint is not None
    assert found.checkpoint.step == 3
    assert not found.damage


def test_pruning_deletes_old_commits_and_old_uncommitted_steps(tmp_path: Path) -> None:
    store = _three_saves(tmp_path)
    (tmp_path / "step_00000000").mkdir()  # of a killed save
    (tmp_path / "step_00000009").mkdir()  # newer, so another process may be writing it
    assert store.prune(CheckpointConfig(keep_last=1)) == [1, 2]
    assert committed_steps(str(tmp_path)) == [3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003", "step_00000009"]


@given(
    steps=st.sets(st.integers(1, 100), max_size=20),
    keep_last=st.integers(1, 5),
    every=st.none() | st.integers(1, 10),
)
def test_pruning_keeps_the_last_steps_and_the_multiples(
    steps: set[int], keep_last: int, every: int | None
) -> None:
    pruned = steps_to_prune(sorted(steps), CheckpointConfig(keep_last=keep_last, keep_every_steps=every))
    kept = steps - set(pruned)
    assert set(sorted(steps)[-keep_last:]) <= kept
    assert all(step in kept for step in steps if every and step % every == 0)
    assert len(kept) <= keep_last + sum(1 for step in steps if every and step % every == 0)


def test_a_superseded_start_of_a_run_writes_nothing_more(tmp_path: Path) -> None:
    """Such as a rank that its cluster took for dead, or a run that was submitted twice."""
    training = run_alone(Scenario(), 1)
    first, second = (CheckpointStore(str(tmp_path), SingleProcess()) for _ in range(2))
    first.become_writer()
    first.save(training.take_snapshot())
    second.become_writer()
    training.run(2)
    second.save(training.take_snapshot())
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    training.run(3)
    with pytest.raises(SupersededError, match="Another start of this run"):
        first.save(training.take_snapshot())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    second.save(training.take_snapshot())
    assert committed_steps(str(tmp_path)) == [1, 2, 3]
