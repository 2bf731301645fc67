"""What saves and cleaning remove is their own, and a failed clean-up ends no run."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.engine_scenarios import PARTLY, Scenario, run_alone

from distft import storage
from distft.checkpoint import retention
from distft.checkpoint.background import CheckpointSaver
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.reshard import write_distft
from distft.checkpoint.steps import committed_steps
from distft.checkpoint.store import CheckpointStore
from distft.checkpoint.target import UNFINISHED_MARKER
from distft.checkpoint.writer_fence import WRITER_FILE, WriterFence
from distft.collectives import SingleProcess
from distft.errors import ConfigError, StorageError, SupersededError, UnreachableError
from distft.storage import errors

KEEP_ONE = CheckpointConfig(keep_last=1)


def _store(root: Path) -> CheckpointStore:
    return CheckpointStore(str(root), SingleProcess())


# Cleaning


def test_cleaning_leaves_the_files_that_distft_did_not_write(tmp_path: Path) -> None:
    store, training = _store(tmp_path), run_alone(Scenario(), 0)
    for step in (1, 2, 3):
        training.run(step)
        store.save(training.take_snapshot())
    foreign = [
        tmp_path / name for name in ("step_00000001/notes.txt", "step_00000002/x/manifest.json", "a.txt")
    ]
    foreign += [tmp_path / "step_0/notes.txt", tmp_path / "frozen_old/rank_00000.safetensors"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert store.prune(KEEP_ONE) == [1, 2]
    assert store.prune(KEEP_ONE) == []
    kept = {path for path in tmp_path.rglob("*") if path.is_file() and "step_00000003" not in path.parts}
    assert kept == set(foreign)


@pytest.mark.parametrize("what", ["step", "frozen"])
def test_cleaning_follows_no_symbolic_link_and_says_so(tmp_path: Path, what: str) -> None:
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    store = _store(root)
    run_alone(PARTLY, 1).save(str(root))
    run_alone(Scenario(micro_batch_size=8, trainable=("blocks.0.*",)), 2).save(str(root))
    moved = root / {"step": "step_00000001", "frozen": "frozen_00000001"}[what]
    moved.rename(elsewhere)
    moved.symlink_to(elsewhere)
    before = {path: path.read_bytes() for path in elsewhere.iterdir()}
    with pytest.raises(StorageError, match=f"{moved.name} is a symbolic link, which is not followed"):
        store.prune(KEEP_ONE)
    assert {path: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert moved.is_symlink()
    assert storage.exists(store.path(2))


def test_removing_the_tree_of_a_link_removes_the_link_alone(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "manifest.json").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    storage.remove_tree(tmp_path / "link")
    assert [path.name for path in tmp_path.rglob("*")] == ["real", "manifest.json"]


def test_a_failed_clean_up_is_told_once_and_tried_again_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = retention.delete_own_files

    def refuse(path: str, **options: Any) -> str:
        if is_broken and "step_" in path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, **options)

    monkeypatch.setattr(retention, "delete_own_files", refuse)
    is_broken = True
    saver = CheckpointSaver(_store(tmp_path), KEEP_ONE)
    training = run_alone(Scenario(), 0)
    for step in (1, 2, 3):
        training.run(step)
        saver.save(training.take_snapshot())
        saver.wait()
    problems = [result.cleanup_problem for result in saver.collect()]
    assert [bool(problem) for problem in problems] == [False, True, False]
    assert "Permission denied" in problems[1]
    assert committed_steps(str(tmp_path)) == [1, 2, 3]
    is_broken = False
    training.run(4)
    saver.save(training.take_snapshot())
    saver.wait()
    assert committed_steps(str(tmp_path)) == [4]


def test_files_of_killed_saves_of_one_step_do_not_add_up(tmp_path: Path) -> None:
    training = run_alone(PARTLY, 1)
    for attempt in range(3):
        for name in (
            f"step_00000001/rank_00000_{attempt:08x}.safetensors",
            f"frozen_00000001_{attempt:08x}/rank_00000.safetensors",
        ):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"of a killed save")
    (tmp_path / "step_00000001" / "rank_00001.safetensors.draft-0123abcd").write_bytes(b"of a killed save")
    store = _store(tmp_path)
    store.become_writer()
    store.save(training.take_snapshot())
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != WRITER_FILE]
    assert sorted(path.name.partition("_")[0] for path in files) == ["manifest.json", "rank", "rank"]
    assert all(path.read_bytes() != b"of a killed save" for path in files)


# The tools' targets


@pytest.mark.parametrize("marker", ["Being written from x.", "mine"])
def test_a_tool_never_empties_a_directory_with_files_of_others(tmp_path: Path, marker: str) -> None:
    commit = run_alone(Scenario(), 1).save(str(tmp_path / "checkpoints"))
    target = tmp_path / "out"
    target.mkdir()
    (target / UNFINISHED_MARKER).write_text(marker)
    (target / "rank_00007.safetensors").write_text("of an interrupted reshard")
    notes = target / ("thesis.md" if marker != "mine" else "rank_00000.safetensors")
    notes.write_text("mine")
    before = {path: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ConfigError, match=r"thesis.md, which distft did not write|is not empty"):
        write_distft(Checkpoint.open(commit), str(target))
    assert {path: path.read_bytes() for path in target.iterdir()} == before
    notes.unlink()
    (target / UNFINISHED_MARKER).write_text("Being written from x.")
    write_distft(Checkpoint.open(commit), str(target))
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", "rank_00000.safetensors"]


# A disk whose errors pass


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_an_error_of_the_disk_never_makes_a_run_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(errors, "RETRY_WAITS_S", (0.0, 0.0))
    training = run_alone(Scenario(), 1)
    training.save(str(tmp_path))
    training.run(2)
    newest = training.save(str(tmp_path))
    real, num_failed = os.open, 0
    most = 2.0

    def fail(path: Any, *args: Any, **options: Any) -> int:
        nonlocal num_failed
        if str(path).startswith(newest) and num_failed < most:
            num_failed += 1
            raise OSError(number, os.strerror(number), path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", fail)
    found = _store(tmp_path).find_latest_valid()
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.damage) == (2, [])
    assert num_failed == 2
    most = float("inf")
    with pytest.raises(UnreachableError, match="Check the disk") as caught:
        _store(tmp_path).find_latest_valid()
    assert caught.value.exit_code == 1


# The claim


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": 3}', b"\xff", b"x" * 100_000])
def test_a_broken_claim_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WRITER_FILE).write_bytes(content)
    fence = WriterFence(str(tmp_path))
    fence.acquire()
    fence.check()
    (tmp_path / WRITER_FILE).write_bytes(content)
    fence.check()
    assert json.loads((tmp_path / WRITER_FILE).read_bytes())["name"] == fence.name


def test_a_launcher_whose_start_was_taken_over_from_does_not_take_over_again(tmp_path: Path) -> None:
    """Two torchruns with --max-restarts for one run would do so by turns."""

    def start(launch: str | None) -> WriterFence:
        fence = WriterFence(str(tmp_path))
        fence.acquire(launch)
        return fence

    first = start("a")
    again = start("a")  # torchrun starts failed ranks again
    with pytest.raises(SupersededError):
        first.check()
    start("b")
    with pytest.raises(SupersededError, match="Another start of this run"):
        again.check()
    with pytest.raises(SupersededError, match="If both are intended, give each its own run_dir"):
        start("a")
    start("b").check()
    start(None)  # by hand, without a launcher
    with pytest.raises(SupersededError):
        start("b")
    start("c").check()
    start(None).check()


def test_a_tokenizer_alone_in_a_step_is_not_deleted(tmp_path: Path) -> None:
    store = _store(tmp_path)
    mine = tmp_path / "step_00000001" / "tokenizer.model"
    mine.parent.mkdir(parents=True)
    mine.write_text("the only copy")
    run_alone(Scenario(), 2).save(str(tmp_path))
    store.prune(KEEP_ONE)
    assert mine.read_text() == "the only copy"


def test_a_tool_does_not_empty_a_target_that_contains_its_source(tmp_path: Path) -> None:
    run_alone(Scenario(), 1).save(str(tmp_path))
    (tmp_path / UNFINISHED_MARKER).write_text("Being written from x.")
    with pytest.raises(ConfigError, match=r"lies in .*, which is the target"):
        write_distft(Checkpoint.open(str(tmp_path / "step_00000001")), str(tmp_path))
    assert Checkpoint.open(str(tmp_path / "step_00000001")).find_damage() == []


def test_a_link_to_a_commit_is_that_commit(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    run_alone(Scenario(), 1).save(str(root))
    link = tmp_path / "latest"
    link.symlink_to(root / "step_00000001")
    with pytest.raises(ConfigError, match="lies in the source"):
        write_distft(Checkpoint.open(str(link)), str(root / "step_00000002"))
