"""What one search and one save of a store do with its files, without an engine."""

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.damage import flip_bit
from support.small_commits import (
    KEEP_ONE,
    RANK_FILE,
    frozen_directories,
    names,
    new_start,
    put,
    saved,
    snapshot,
)

from distft import storage
from distft.checkpoint import store as store_module
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.steps import committed_steps, rank_file_name
from distft.checkpoint.store import CheckpointStore, LatestValid
from distft.checkpoint.writer_fence import WRITER_FILE
from distft.collectives import SingleProcess
from distft.errors import StorageError, SupersededError, UnreachableError
from distft.storage.local import LocalStorage
from distft.tokenizer.files import SENTENCEPIECE_FILE as TOKENIZER_FILE

# The search


def test_in_an_empty_directory_nothing_is_found_and_a_commit_is_news(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), SingleProcess())
    found = store.find_latest_valid()
    assert found == LatestValid(None, [], frozenset(), ((), None))
    assert store.is_still_latest(found)
    store.save(snapshot(1))
    assert not store.is_still_latest(found)


def test_a_search_is_out_of_date_when_the_newest_commit_was_written_again(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    found = store.find_latest_valid()
    assert found.listed[0] == (1, 2)
    assert store.is_still_latest(found)
    store.save(snapshot(2))
    assert not store.is_still_latest(found)


def test_all_damaged_commits_are_told_the_newest_first_and_counted_no_more(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2, 3)
    for step in (1, 2):
        (file,) = Path(store.path(step)).glob("rank_*")
        flip_bit(file, -2)
    shutil.rmtree(store.path(3))
    shutil.copytree(store.path(1), store.path(3))
    found = store.find_latest_valid()
    assert found.checkpoint is None
    assert found.damaged_steps == {1, 2, 3}
    assert [line.partition(": ")[0] for line in found.damage] == ["step 3", "step 2", "step 1"]
    assert "contains the checkpoint of step 1, according to its manifest" in found.damage[0]
    assert found.damage[0].endswith("manifest: it was put there by mistake.")
    store.resume_from(found)
    assert store.valid_steps() == []
    store.save(snapshot(2))
    assert store.valid_steps() == [2]  # written anew


def test_damage_is_told_with_the_valid_commit_before_it_and_names_the_manifest(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    Path(store.path(2), MANIFEST).write_text("{")
    found = store.find_latest_valid()
    assert found.checkpoint is not None
    assert found.checkpoint.step == 1
    (line,) = found.damage
    assert line.startswith("step 2: ")
    assert str(Path(store.path(2), MANIFEST)) in line
    assert found.damaged_steps == {2}


def test_a_disk_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(LocalStorage, "list_names", fail)
    with pytest.raises(UnreachableError, match=f"^{tmp_path}: reading failed: Permission denied"):
        CheckpointStore(str(tmp_path), SingleProcess()).find_latest_valid()


def test_in_an_object_store_a_commit_that_was_written_again_is_news() -> None:
    store = new_start("memory://store-operations/again")
    store.save(snapshot(1))
    found = store.find_latest_valid()
    assert found.listed[1] is not None
    assert store.is_still_latest(found)
    store.save(snapshot(1))
    assert not store.is_still_latest(found)
    storage.remove_tree("memory://store-operations")


# Saves


def test_a_launch_that_lost_the_run_does_not_take_it_back(tmp_path: Path) -> None:
    for launch in ("first", "second"):
        CheckpointStore(str(tmp_path), SingleProcess()).become_writer(launch)
    with pytest.raises(SupersededError):
        CheckpointStore(str(tmp_path), SingleProcess()).become_writer("first")


def test_a_commit_that_is_written_again_stays_whole_until_the_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved(tmp_path, 1)
    before = {path: path.read_bytes() for path in Path(store.path(1)).iterdir()}
    draft = f"{MANIFEST}.draft-0123abcd"
    put(Path(store.path(1)), draft)

    def fail(*_: object, **__: object) -> None:
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_rank_file", fail)
        with pytest.raises(StorageError, match="no space left"):
            store.save(snapshot(1))
    assert {path: path.read_bytes() for path in Path(store.path(1)).iterdir()} == before
    assert store.save(snapshot(1)) == store.path(1)
    (old,) = (path.name for path in before if path.name.startswith("rank_"))
    new = Checkpoint.open(store.path(1)).manifest.files[0].name
    assert names(store.path(1)) == {MANIFEST, TOKENIZER_FILE, old, new}
    assert new != old
    store.prune(KEEP_ONE)
    assert names(store.path(1)) == {MANIFEST, TOKENIZER_FILE, new}
    put(Path(store.path(1)), rank_file_name(9))
    store.prune(KEEP_ONE)  # tidied once
    assert rank_file_name(9) in names(store.path(1))


def test_files_carry_the_name_of_the_start_that_wrote_them(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), SingleProcess())
    store.save(snapshot(1))
    assert RANK_FILE in names(store.path(1))  # of a tool, which claims nothing
    store.become_writer()
    store.save(snapshot(2))
    name = storage.read_bytes(tmp_path / WRITER_FILE).decode().partition('"name":"')[2].partition('"')[0]
    assert rank_file_name(0, name) in names(store.path(2))


def test_a_save_replaces_the_manifest_that_it_saw_or_one_that_an_earlier_start_put_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved(tmp_path, 1)
    manifest, real = Path(store.path(1), MANIFEST), storage.commit_unless_changed
    seen = {name: storage.version(storage.join(store.path(1), name)) for name in (TOKENIZER_FILE, MANIFEST)}
    expected: list[tuple[str, str | None]] = []

    def come_between(path: str, data: bytes, **options: Any) -> bool:
        expected.append((Path(path).name, options["expected"]))
        if len(expected) == 2:
            storage.commit_bytes(manifest, b"of an earlier start")
            seen["between"] = storage.version(manifest)
        return real(path, data, **options)

    monkeypatch.setattr(storage, "commit_unless_changed", come_between)
    store.save(snapshot(1))
    assert expected == [
        (TOKENIZER_FILE, seen[TOKENIZER_FILE]),
        (MANIFEST, seen[MANIFEST]),
        (MANIFEST, seen["between"]),
    ]
    assert Checkpoint.open(store.path(1)).find_damage() == []


@pytest.mark.parametrize("name", [TOKENIZER_FILE, MANIFEST])
def test_a_start_that_lost_the_claim_right_before_a_file_does_not_put_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    store, real = saved(tmp_path, 1), storage.commit_unless_changed

    def lose_the_claim(path: str, data: bytes, **options: Any) -> bool:
        if Path(path).name == name:
            CheckpointStore(str(tmp_path), SingleProcess()).become_writer()
        return real(path, data, **options)

    monkeypatch.setattr(storage, "commit_unless_changed", lose_the_claim)
    with pytest.raises(SupersededError):
        store.save(snapshot(2))
    assert committed_steps(str(tmp_path)) == [1]
    assert name not in names(store.path(2))


def test_a_failed_save_of_a_superseded_start_is_told_as_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later start deletes files that the earlier one is writing."""
    store = saved(tmp_path, 1)

    def lose_the_claim(*_: object, **__: object) -> None:
        new_start(tmp_path)
        raise StorageError("the file is gone")

    monkeypatch.setattr(store_module, "write_rank_file", lose_the_claim)
    with pytest.raises(SupersededError):
        store.save(snapshot(2))


def test_a_save_first_removes_what_killed_saves_of_its_step_left(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    (used,) = frozen_directories(tmp_path)
    Path(tmp_path, "step_00000004", MANIFEST).unlink()
    left = put(tmp_path / "frozen_00000004_0123abcd", RANK_FILE)
    other_step = put(tmp_path / "frozen_00000003_0123abcd", RANK_FILE)
    draft = put(tmp_path / "step_00000004", f"{MANIFEST}.draft-0123abcd") / f"{MANIFEST}.draft-0123abcd"
    put(tmp_path / "step_00000004", rank_file_name(7), "notes.txt")
    store = new_start(tmp_path)
    store.save(snapshot(4))
    assert not left.exists()
    assert not draft.exists()
    assert other_step.exists()  # cleaning deletes it
    assert frozen_directories(tmp_path) == {used, other_step.name}
    own = Checkpoint.open(store.path(4)).manifest.files[0].name
    assert names(store.path(4)) == {MANIFEST, TOKENIZER_FILE, own, "notes.txt"}
    put(Path(store.path(4)), rank_file_name(9))
    store.prune(CheckpointConfig(keep_last=2))
    assert rank_file_name(9) in names(store.path(4))  # nobody's files were there when the save began


def test_frozen_weights_of_a_killed_save_that_a_commit_refers_to_are_not_removed(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    Path(tmp_path, "step_00000002", MANIFEST).unlink()
    store = new_start(tmp_path)
    store.save(snapshot(2, frozen=5.0))
    assert Checkpoint.open(store.path(4)).find_damage() == []
    assert len(frozen_directories(tmp_path)) == 2


def test_commits_that_an_earlier_start_adds_late_do_not_count_and_are_deleted(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    store = new_start(tmp_path)
    shutil.copytree(store.path(1), store.path(2))
    assert store.valid_steps() == [1]
    for step in (3, 4):
        store.save(snapshot(step))
    assert store.valid_steps() == [1, 3, 4]
    assert store.prune(CheckpointConfig(keep_last=2)) == [1]
    assert committed_steps(str(tmp_path)) == [3, 4]
    shutil.copytree(store.path(3), store.path(1))
    assert store.valid_steps() == [3, 4]  # a step that was deleted counts no more
    put(Path(store.path(1)).parent / "step_00000009", RANK_FILE)
    assert store.prune(CheckpointConfig(keep_last=2)) == []
    assert committed_steps(str(tmp_path)) == [3, 4]
    assert (tmp_path / "step_00000009").exists()


def test_a_superseded_start_prunes_nothing(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    new_start(tmp_path)
    with pytest.raises(SupersededError):
        store.prune(KEEP_ONE)
    assert committed_steps(str(tmp_path)) == [1, 2]


def test_steps_that_are_pruned_are_not_tidied(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 1, 2, 2, 3)
    for step in (1, 2):
        assert len(names(store.path(step))) == 4  # with the file of the first save
    assert store.prune(CheckpointConfig(keep_last=2)) == [1]
    assert names(tmp_path) >= {"step_00000002", "step_00000003"}
    assert "step_00000001" not in names(tmp_path)
    assert len(names(store.path(2))) == 3


def test_in_an_object_store_files_of_killed_saves_are_deleted_after_the_commit() -> None:
    root = "memory://store-operations/run"
    store = new_start(root)
    left = storage.join(store.path(1), rank_file_name(7))
    storage.commit_bytes(left, b"of a killed save")
    store.save(snapshot(1))
    assert storage.exists(left)
    (file,) = (f.name for f in Checkpoint.open(store.path(1)).manifest.files if "/" not in f.name)
    store.prune(KEEP_ONE)
    assert names(store.path(1)) == {MANIFEST, TOKENIZER_FILE, file}
    storage.remove_tree("memory://store-operations")
