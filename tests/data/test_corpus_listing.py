"""Which files a directory, glob or file name stands for, and what is said about the others."""

import os
from collections import Counter
from pathlib import Path

import fsspec
import pytest

from distft.data.corpus import (
    JsonlCorpus,
    ListedCorpus,
    MixtureCorpus,
    StdlibCorpus,
    TextCorpus,
    WeightedCorpus,
)
from distft.data.corpus_kinds import SUFFIXES, kind_of_corpus
from distft.data.corpus_listing import list_files
from distft.errors import ConfigError, DataError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 124800\n"


def make(root: Path, *names: str) -> str:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("some text")
    return str(root)


def read(path: str, kind: str = "jsonl") -> tuple[list[str], Counter[str]]:
    """Names of the files that are read, below the directory `path`, and the counts of the others."""
    listing = list_files((path,), SUFFIXES[kind])
    return [url.removeprefix(path).lstrip("/") for url in listing.files], listing.passed_over


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.txt", "b.md", "c.png"], "text"),
        (["README.md", "data/train-00000.parquet"], "parquet"),
        (["README.md", "dataset_infos.json", "data/a.PARQUET"], "parquet"),
        (["info.json", "data/a.parquet"], "parquet"),
        (["info.json", "a.csv", "LICENSE.txt"], "csv"),
        (["a.json", "b.jsonl.gz", "License.md", "requirements.txt", "code_of_conduct.md"], "jsonl"),
        (["year=2020/part-0.NDJSON.ZST", "year=2021/part-0.json", "_SUCCESS", "x.log"], "jsonl"),
        ([".git/config.json", ".cache/a.parquet", "a.tsv"], "csv"),
        (["_delta_log/0.json", "_temporary/b.csv", "part-0.parquet", ".part-0.parquet.crc"], "parquet"),
        (["__MACOSX/a.jsonl", "SHA256SUMS.txt", "b.rst"], "text"),
    ],
)
def test_a_directory_is_of_the_kind_of_its_files_without_descriptions(
    tmp_path: Path, names: list[str], kind: str
) -> None:
    assert kind_of_corpus([make(tmp_path, *names)]) == kind


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["a.jsonl", "b.parquet"], "jsonl and parquet"),
        (["a.jsonl", "deep/b.CSV.gz", "README.md"], "csv and jsonl"),
        (["a.tsv", "b.json", "c.parquet"], "csv and parquet"),
        (["a.txt", "b.txt", "index.csv"], "csv and text"),
        (["guide.md", "README.md", "deep/a.json"], "jsonl and text"),
        (["readmes.md", "a.parquet"], "parquet and text"),
    ],
)
def test_a_directory_of_two_kinds_is_refused(tmp_path: Path, names: list[str], kinds: str) -> None:
    with pytest.raises(ConfigError, match=f"CORPUS mixes {kinds} files"):
        kind_of_corpus([make(tmp_path, *names)])


def test_paths_of_several_kinds_are_refused_with_their_numbers(tmp_path: Path) -> None:
    here = make(tmp_path, "a/README.md", "a/b.jsonl", "c/d.txt", "c/e.txt")
    assert kind_of_corpus([f"{here}/a", f"{here}/a/*.jsonl"]) == "jsonl"
    for paths in ([f"{here}/a", f"{here}/c"], [f"{here}/*/*"], [f"{here}/a/README.md", f"{here}/a/b.jsonl"]):
        with pytest.raises(ConfigError, match=r"CORPUS mixes jsonl and text files \(\d \w+, \d \w+\)"):
            kind_of_corpus(paths)


def test_nothing_unknown_is_text_unless_it_is_named(tmp_path: Path) -> None:
    here = make(tmp_path, "code/a.py", "code/b.py", "code/c")
    with pytest.raises(ConfigError, match=r"has no file of a known ending .*it has 2 \.py, 1 without ending"):
        kind_of_corpus([f"{here}/code"])
    with pytest.raises(ConfigError, match="no file of a known ending"):
        kind_of_corpus([f"{here}/code/*"])
    for path in ("code/a.py", "code/c", "**/*.py"):
        assert kind_of_corpus([f"{here}/{path}"]) == "text"
    assert read(f"{here}/**/*.py", "text")[0] == [
        f"{here}/code/a.py".lstrip("/"),
        f"{here}/code/b.py".lstrip("/"),
    ]
    make(tmp_path, "code/d.txt")
    assert read(f"{here}/code", "text") == (["d.txt"], {".py": 2, "without ending": 1})


def test_what_is_passed_over_is_counted_by_ending_or_reason(tmp_path: Path) -> None:
    here = make(
        tmp_path,
        "b/x.jsonl",
        "a.JSONL.GZ",
        "README.md",
        "c.md",
        "_SUCCESS",
        ".DS_Store",
        ".git/d.jsonl",
        "e.bin.gz",
    )
    (tmp_path / "empty.jsonl").touch()
    os.mkfifo(tmp_path / "pipe.jsonl")
    names, passed_over = read(here)
    assert names == ["a.JSONL.GZ", "b/x.jsonl"]
    assert passed_over == {".md": 2, "hidden": 2, "_SUCCESS": 1, ".bin": 1, "empty": 1, "special file": 1}
    lines = ListedCorpus(JsonlCorpus(paths=(here,))).describe()
    assert lines[0].startswith("Reading 2 .jsonl (18 bytes). Passed over: 2 hidden, 2 .md, 1 _SUCCESS, ")
    mixture = MixtureCorpus(sources=(WeightedCorpus(corpus=JsonlCorpus(paths=(here,))),) * 2)
    assert ListedCorpus(mixture).describe() == [f"Source {n}: {lines[0]}" for n in (1, 2)]
    assert ListedCorpus(StdlibCorpus()).describe() == []


def test_the_order_is_by_whole_name_for_directories_and_globs(tmp_path: Path) -> None:
    names = ["a.txt", "a/b.txt", "a-b/c.txt", "B.txt", "year=2020/a.txt", "year=2019/z.txt"]
    here = make(tmp_path, *names)
    assert read(here, "text")[0] == sorted(names)
    assert read(f"{here}/*", "text")[0] == [f"{here}/{name}".lstrip("/") for name in sorted(names)]


@pytest.mark.parametrize("protocol", ["", "memory://"])
def test_endings_of_globs_are_of_any_case_as_in_directories(tmp_path: Path, protocol: str) -> None:
    filesystem = fsspec.filesystem("memory" if protocol else "file")
    names = ["UP.JSONL", "a.jsonl", "b/c.Jsonl", "d.JSONL.gz", "e.jsonl.GZ", "f.jsonlx", "g.jsonl.zst"]
    for name in names:
        filesystem.makedirs(f"{tmp_path}/b", exist_ok=True)
        filesystem.pipe_file(f"{tmp_path}/{name}", b"text")

    def found(pattern: str) -> list[str]:
        files = list_files((f"{protocol}{tmp_path}/{pattern}",), SUFFIXES["jsonl"]).files
        return [url.rpartition("/")[2] for url in files]

    assert found("**/*.jsonl") == ["UP.JSONL", "a.jsonl", "c.Jsonl"]
    assert found("*.jsonl.gz") == ["d.JSONL.gz", "e.jsonl.GZ"]
    assert found("[A-Z]*.JSONL") == ["UP.JSONL"]  # the rest of a glob is as it is written


def test_links_to_files_are_followed_as_in_a_hub_cache(tmp_path: Path) -> None:
    make(tmp_path, "blobs/0a1b", "blobs/2c3d")
    snapshot = tmp_path / "snapshots/main/data"
    snapshot.mkdir(parents=True)
    for name, blob in (("train.jsonl", "0a1b"), ("test.jsonl", "2c3d")):
        (snapshot / name).symlink_to(f"../../../blobs/{blob}")
    assert kind_of_corpus([str(tmp_path / "snapshots/main")]) == "jsonl"
    for path in ("snapshots/main", "snapshots/*", "snapshots/main/data/*.jsonl"):
        names = list(list_files((str(tmp_path / path),), SUFFIXES["jsonl"]).files)
        assert [Path(name).name for name in names] == ["test.jsonl", "train.jsonl"]


def test_directory_links_are_followed_once_and_never_in_a_cycle(tmp_path: Path) -> None:
    here = make(tmp_path / "corpus", "a/x.jsonl")
    make(tmp_path / "elsewhere", "y.jsonl")
    (tmp_path / "corpus/a/up").symlink_to("..")
    (tmp_path / "corpus/self").symlink_to("self")
    (tmp_path / "corpus/again").symlink_to("a")
    (tmp_path / "corpus/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus/out2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "corpus")
    names, passed_over = read(here)
    assert names == ["a/x.jsonl", "out/y.jsonl"]
    assert passed_over == {"directory link": 4, "without ending": 1}


def test_a_link_to_nothing_is_an_error_if_it_would_be_read(tmp_path: Path) -> None:
    here = make(tmp_path, "a.jsonl")
    (tmp_path / "README.md").symlink_to("gone.md")
    assert read(here) == (["a.jsonl"], {".md": 1})
    (tmp_path / "b.jsonl").symlink_to("gone")
    for path in (here, f"{here}/*", f"{here}/*.jsonl"):
        with pytest.raises(DataError, match=r"b\.jsonl is a link to a file that does not exist"):
            read(path)


@pytest.mark.parametrize("path", ["{}", "{}/b.jsonl", "{}/*.jsonl"])
def test_git_lfs_pointers_are_named_before_anything_is_read(tmp_path: Path, path: str) -> None:
    here = make(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").write_text(POINTER)
    with pytest.raises(DataError, match=r"b\.jsonl is a git-LFS pointer, not the file: run `git lfs pull`"):
        read(path.format(here))


def test_missing_files_of_a_numbered_set_are_told(tmp_path: Path) -> None:
    here = make(tmp_path, *(f"train-{n:05}-of-00004.jsonl" for n in (0, 1, 3)), "test-00000-of-00001.jsonl")
    lines = ListedCorpus(JsonlCorpus(paths=(here,))).describe()
    assert lines[1:] == [f"1 of the 4 files {here}/train-*-of-00004.jsonl are missing: 00002."]
    make(tmp_path, "train-00002-of-00004.jsonl", "shard-00001-of-99999.jsonl")
    assert ListedCorpus(JsonlCorpus(paths=(here,))).describe()[1:] == [
        f"99,998 of the 99,999 files {here}/shard-*-of-99999.jsonl are missing: "
        "00002, 00003, 00004, 00005, 00006, ...."
    ]


def test_pipes_devices_and_directories_without_files_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError) as caught:
        list_files(
            (f"{tmp_path}/pipe.jsonl", "/dev/zero", f"{tmp_path}/folder", f"{tmp_path}/a.txt"), (".txt",)
        )
    pipe, device, folder, missing = str(caught.value).splitlines()
    assert "no regular file, but a pipe, device or socket" in pipe
    assert "no regular file, but a pipe, device or socket" in device
    assert "is a directory without files" in folder
    assert "does not exist" in missing


def test_directories_of_a_store_follow_the_same_rule() -> None:
    filesystem = fsspec.filesystem("memory")
    for name in (
        "README.md",
        "data/b.jsonl",
        "data/_SUCCESS",
        "data/.x.crc",
        "y=1/a.JSONL",
        "_delta_log/0.json",
    ):
        filesystem.pipe_file(f"/listing/{name}", b"text")
    assert kind_of_corpus(["memory://listing"]) == "jsonl"
    listing = list_files(("memory://listing",), SUFFIXES["jsonl"])
    assert list(listing.files) == ["memory:///listing/data/b.jsonl", "memory:///listing/y=1/a.JSONL"]
    assert listing.passed_over == {".md": 1, "hidden": 1, "_SUCCESS": 1, "_delta_log": 1}


def test_the_version_of_a_file_is_that_of_what_a_link_points_to(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to("a.txt")
    os.utime(tmp_path / "a.txt", (1.5, 1.5))
    assert {file.version for file in TextCorpus(paths=(str(tmp_path),)).files()} == {"1.5"}
