"""What cleaning deletes, in which order, and what it leaves, without an engine."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.faulty_disk import FaultyDisk
from support.small_commits import RANK_FILE, frozen_directories, names, new_start, put, saved, snapshot

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.frozen import FrozenWeights
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.retention import delete_own_files, delete_unneeded
from distft.checkpoint.steps import committed_steps, rank_file_name
from distft.collectives import SingleProcess
from distft.errors import StorageError, SupersededError
from distft.tokenizer.files import SENTENCEPIECE_FILE as TOKENIZER_FILE


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
