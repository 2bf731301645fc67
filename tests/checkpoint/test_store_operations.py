"""What one save, one search and one cleaning of a store do with its files, without an engine."""

import errno
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.damage import flip_bit
from support.faulty_disk import FaultyDisk

from distft import storage
from distft.checkpoint import store as store_module
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.frozen import FrozenWeights
from distft.checkpoint.manifest import MANIFEST, Progress
from distft.checkpoint.retention import delete_own_files, delete_unneeded
from distft.checkpoint.snapshot import CheckpointSnapshot, ParameterInfo, RunMetadata
from distft.checkpoint.steps import TOKENIZER_FILE, committed_steps, rank_file_name
from distft.checkpoint.store import CheckpointStore, LatestValid
from distft.checkpoint.writer_fence import WRITER_FILE
from distft.collectives import SingleProcess
from distft.errors import DistftError, StorageError, SupersededError, UnreachableError
from distft.storage.local import LocalStorage

KEEP_ONE = CheckpointConfig(keep_last=1)
RANK_FILE = rank_file_name(0)


def snapshot(step: int, frozen: float = 0.0) -> CheckpointSnapshot:
    return CheckpointSnapshot(
        progress=Progress(step=step),
        fragments=[
            Fragment("moves", WEIGHT, 0, torch.tensor([float(step), 0.5])),
            Fragment("stays", WEIGHT, 0, torch.tensor([frozen])),
        ],
        parameters={"moves": ParameterInfo((2,), True, step), "stays": ParameterInfo((1,), False, 0)},
        metadata=RunMetadata(run_id="test", config={}, written_by={}),
        attachments={TOKENIZER_FILE: b"a model"},
    )


def new_start(root: Path | str) -> CheckpointStore:
    """A start that has claimed the run and resumes from its newest valid commit."""
    store = CheckpointStore(str(root), SingleProcess())
    store.become_writer()
    store.resume_from(store.find_latest_valid())
    return store


def saved(root: Path, *steps: int) -> CheckpointStore:
    store = new_start(root)
    for step in steps:
        store.save(snapshot(step))
    return store


def names(path: Path | str) -> set[str]:
    return set(storage.list_names(str(path)))


def frozen_directories(root: Path) -> set[str]:
    return {name for name in names(root) if name.startswith("frozen_")}


def put(directory: Path, *files: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in files:
        (directory / name).write_bytes(b"of somebody")
    return directory


def nothing_wrong() -> None:
    """The look at the claim of a start that nobody has superseded."""


# Deletion of one directory


def test_the_manifest_is_deleted_first_and_the_ranks_files_last(tmp_path: Path) -> None:
    """After an interruption no commit lacks a file, and what is left can be told to be distft's."""
    draft = f"{MANIFEST}.draft-0123abcd"
    put(tmp_path / "a", RANK_FILE, MANIFEST, TOKENIZER_FILE, rank_file_name(1, "0123"), draft)
    with FaultyDisk(tmp_path) as disk:
        assert delete_own_files(str(tmp_path / "a"), check=nothing_wrong) == ""
    removed = [Path(operation.path).name for operation in disk.operations if operation.kind == "unlink"]
    assert removed[:3] == [draft, MANIFEST, TOKENIZER_FILE]
    assert set(removed[3:]) == {RANK_FILE, rank_file_name(1, "0123")}
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ((TOKENIZER_FILE,), {TOKENIZER_FILE}),
        ((TOKENIZER_FILE, "notes.txt"), {TOKENIZER_FILE, "notes.txt"}),
        ((TOKENIZER_FILE, RANK_FILE), set()),
        ((TOKENIZER_FILE, MANIFEST), set()),
        ((TOKENIZER_FILE, MANIFEST, "notes.txt"), {"notes.txt"}),
        ((RANK_FILE, "rank_0.safetensors"), {"rank_0.safetensors"}),
    ],
)
def test_a_tokenizer_is_deleted_only_beside_a_file_that_is_surely_distfts(
    tmp_path: Path, files: tuple[str, ...], left: set[str]
) -> None:
    directory = put(tmp_path / "a", *files)
    assert delete_own_files(str(directory), check=nothing_wrong) == ""
    assert names(directory) == left
    assert directory.exists() == bool(left)


def test_files_to_keep_are_kept_also_where_the_manifest_is_one(tmp_path: Path) -> None:
    directory = put(tmp_path / "a", RANK_FILE, rank_file_name(0, "0123"), MANIFEST, TOKENIZER_FILE)
    keep = {RANK_FILE, MANIFEST, TOKENIZER_FILE}
    assert delete_own_files(str(directory), check=nothing_wrong, keep=keep) == ""
    assert names(directory) == keep


@pytest.mark.parametrize("comes", [MANIFEST, rank_file_name(3)])
def test_what_comes_after_the_look_at_the_claim_is_not_deleted(tmp_path: Path, comes: str) -> None:
    """A manifest makes the rest a commit; another file is of a start that the look did not see."""
    directory = put(tmp_path / "a", RANK_FILE)

    def look_and_be_overtaken() -> None:
        put(directory, comes)

    assert delete_own_files(str(directory), check=look_and_be_overtaken) == ""
    assert names(directory) == ({MANIFEST, RANK_FILE} if comes == MANIFEST else {comes})


def test_a_superseded_start_deletes_nothing(tmp_path: Path) -> None:
    files = {RANK_FILE, MANIFEST, f"{MANIFEST}.draft-0123abcd"}
    directory = put(tmp_path / "a", *files)

    def superseded() -> None:
        raise SupersededError("another start")

    with pytest.raises(SupersededError):
        delete_own_files(str(directory), check=superseded)
    assert {path.name for path in directory.iterdir()} == files


# Cleaning of a run


def delete(root: Path, valid: list[int], pruned: list[int], check: Callable[[], None]) -> None:
    delete_unneeded(str(root), valid, pruned, FrozenWeights(str(root), SingleProcess()), check)


@pytest.mark.parametrize("step", [0, 1, 7])
def test_without_a_valid_commit_nothing_is_deleted(tmp_path: Path, step: int) -> None:
    put(tmp_path / f"step_{step:08d}", RANK_FILE)
    put(tmp_path / f"frozen_{step:08d}", RANK_FILE)
    delete(tmp_path, [], [], nothing_wrong)
    assert len(names(tmp_path)) == 2


def test_frozen_weights_are_deleted_if_they_are_older_and_no_remaining_commit_refers_to_them(
    tmp_path: Path,
) -> None:
    for step, frozen in ((1, 1.0), (2, 2.0), (3, 2.0), (4, 4.0)):  # each start has frozen weights of its own
        new_start(tmp_path).save(snapshot(step, frozen))
    used = frozen_directories(tmp_path)
    assert {int(name.split("_")[1]) for name in used} == {1, 2, 4}
    for later in (4, 5):
        put(tmp_path / f"frozen_{later:08d}_0123abcd", RANK_FILE)  # another start may be writing it
    put(tmp_path / "frozen_00000003_0123abcd", RANK_FILE)
    looks = 0

    def count_looks() -> None:
        nonlocal looks
        looks += 1

    delete(tmp_path, [1, 2, 3, 4], [1, 2], count_looks)
    assert committed_steps(str(tmp_path)) == [3, 4]
    left = {int(name.split("_")[1]) for name in frozen_directories(tmp_path) & used}
    assert left == {2, 4}
    assert frozen_directories(tmp_path) - used == {"frozen_00000004_0123abcd", "frozen_00000005_0123abcd"}
    assert looks == 4  # before each directory: two steps, two of frozen weights
    assert Checkpoint.open(str(tmp_path / "step_00000003")).find_damage() == []


def test_each_directory_that_cannot_be_deleted_is_told_in_a_line(tmp_path: Path) -> None:
    saved(tmp_path / "run", 5)
    for name in ("step_00000001", "frozen_00000002"):
        put(tmp_path / "elsewhere" / name, RANK_FILE)
        (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere" / name)
    put(tmp_path / "run" / "step_00000003", RANK_FILE)
    with pytest.raises(StorageError) as caught:
        delete(tmp_path / "run", [5], [], nothing_wrong)
    first, second = str(caught.value).split("\n")
    for line, name in ((first, "step_00000001"), (second, "frozen_00000002")):
        assert line.startswith(f"{tmp_path / 'run' / name} is a symbolic link")
        assert line.endswith("yourself.")
    assert not (tmp_path / "run" / "step_00000003").exists()
    assert sum(1 for _ in (tmp_path / "elsewhere").rglob("*.safetensors")) == 2


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


# Several ranks


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
