"""Local files, fsspec files and S3 objects behave alike: writes are all or nothing, reads are exact."""

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distft import storage
from distft.errors import ConfigError, StorageError
from distft.storage.local import TEMPORARY_MARK, LocalWriter
from distft.storage.remote import RemoteStorage


@pytest.fixture(params=["path", "file", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3":
        yield f"{request.getfixturevalue('s3').make_bucket()}/a"
        return
    memory = f"memory://{secrets.token_hex(4)}"
    yield {"path": str(tmp_path / "a"), "file": f"file://{tmp_path}/a", "memory": memory}[request.param]
    storage.remove_tree(memory)


@given(st.binary(max_size=300), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_of_a_written_file_can_be_read(root: str, content: bytes, data: st.DataObject) -> None:
    path = storage.join(root, "b", "c.bin")
    storage.commit_bytes(path, content, durable=False)
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, len(content)))
    assert storage.read_range(path, start, stop) == content[start:stop]
    assert storage.read_bytes(path) == bytes(storage.read_view(path)) == content
    assert storage.size(path) == len(content)


def test_a_failed_write_leaves_the_old_content_and_nothing_else(root: str) -> None:
    path = storage.join(root, "c.bin")
    storage.commit_bytes(path, b"old")

    def fail() -> None:
        with storage.open_write(path) as file:
            file.write(b"new")
            assert storage.read_bytes(path) == b"old"
            assert storage.list_names(root) == ["c.bin"]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert storage.read_bytes(path) == b"old"
    local = storage.local_path(root)
    assert local is None or os.listdir(local) == ["c.bin"]  # noqa: PTH208


def test_a_first_write_that_fails_leaves_no_file(root: str) -> None:
    path = storage.join(root, "c.bin")

    def fail() -> None:
        with storage.open_write(path) as file:
            file.write(b"new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not storage.exists(path)


def test_readers_see_complete_files_only(root: str) -> None:
    path = storage.join(root, "c.bin")
    contents = [bytes([i]) * 100_000 for i in range(5)]
    storage.commit_bytes(path, contents[0])
    done = threading.Event()

    def write() -> None:
        for i in range(40):
            storage.commit_bytes(path, contents[i % 5], durable=False)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert storage.read_bytes(path) in contents
    writer.join()


def test_names_are_listed_in_order_and_removed_as_a_tree(root: str) -> None:
    assert storage.list_names(root) == []
    for name in ("z", "b", "d/e"):
        storage.commit_bytes(storage.join(root, *name.split("/")), b"x", durable=False)
    assert storage.list_names(root) == ["b", "d", "z"]
    assert storage.is_directory(storage.join(root, "d"))
    assert not storage.is_directory(storage.join(root, "b"))
    storage.remove(storage.join(root, "b"))
    storage.remove(storage.join(root, "b"))
    assert storage.list_names(root) == ["d", "z"]
    storage.remove_tree(root)
    assert not storage.exists(root)
    storage.remove_tree(root)


def test_sizes_are_listed_of_the_files_that_names_are_listed_of(root: str) -> None:
    assert storage.list_sizes(root) == {}
    for name in ("z", "b", "d/e", f"b{TEMPORARY_MARK}0123abcd"):
        storage.commit_bytes(storage.join(root, *name.split("/")), b"x" * len(name), durable=False)
    assert storage.list_sizes(root) == {"b": 1, "z": 1}
    assert storage.list_names(root) == ["b", "d", "z"]


def test_a_range_beyond_the_end_and_a_missing_file_are_errors(root: str) -> None:
    path = storage.join(root, "c.bin")
    storage.commit_bytes(path, b"12345")
    with pytest.raises(StorageError, match=r"c\.bin is cut short: bytes 3 to 9 are needed, it has 5"):
        storage.read_range(path, 3, 9)
    with pytest.raises(StorageError, match=r"c\.bin is cut short: bytes 7 to 9 are needed, it has 5"):
        storage.read_range(path, 7, 9)
    for read in (storage.read_bytes, storage.read_view, storage.size):
        with pytest.raises(FileNotFoundError):
            read(storage.join(root, "none"))


def test_a_file_is_copied_between_file_systems(tmp_path: Path) -> None:
    content = secrets.token_bytes(100_000)
    storage.commit_bytes(tmp_path / "a", content)
    storage.copy(tmp_path / "a", "memory://copied/a")
    storage.copy("memory://copied/a", tmp_path / "deep" / "b")
    assert (tmp_path / "deep" / "b").read_bytes() == content


def test_a_file_system_without_atomic_put_gets_a_temporary_file_that_is_renamed(tmp_path: Path) -> None:
    remote = RemoteStorage(fsspec.filesystem("file"))
    path = f"{tmp_path}/x/c.bin"
    with remote.open_write(path, durable=True) as file:
        file.write(b"new")
        assert not remote.exists(path)
    out = bytearray(2)
    assert remote.read_into(path, 1, memoryview(out)) == 2
    assert out == b"ew"
    assert os.listdir(tmp_path / "x") == ["c.bin"]  # noqa: PTH208


def test_a_large_remote_file_is_uploaded_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distft.storage.remote._IN_MEMORY_BYTES", 10)
    storage.commit_bytes("memory://large/a", b"x" * 1000)
    assert storage.read_bytes("memory://large/a") == b"x" * 1000


@pytest.mark.parametrize("num_bytes", [1, 5 << 20])
def test_a_full_disk_is_a_storage_error_and_leaves_the_old_content(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "c.bin"
    path.write_bytes(b"old")

    def fill() -> None:
        with LocalWriter(path, durable=True) as writer:
            writer._file.close()
            writer._file = Path("/dev/full").open("wb", buffering=1 << 20)  # noqa: SIM115 - closed by the writer
            writer.write(b"x" * num_bytes)

    with pytest.raises(StorageError) as caught:
        fill()
    text = str(caught.value)
    assert text.startswith(f"{path}: no space left")
    assert "bytes are free" in text
    assert "Free some space" in text
    assert f"for {num_bytes:,} bytes" in text
    assert [p.name for p in tmp_path.iterdir()] == ["c.bin"]
    assert path.read_bytes() == b"old"


def test_other_system_errors_pass_unchanged(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((NotADirectoryError, FileExistsError)):
        storage.commit_bytes(tmp_path / "file" / "below", b"x")


def test_a_killed_writer_leaves_the_old_content_and_a_removable_temporary_file(tmp_path: Path) -> None:
    storage.commit_bytes(tmp_path / "a", b"old")
    program = (
        "import os, signal, sys; from distft import storage\n"
        "with storage.open_write(sys.argv[1]) as file:\n"
        "    file.write(b'n' * 5_000_000); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=False)
    assert killed.returncode == -9
    assert storage.read_bytes(tmp_path / "a") == b"old"
    assert storage.list_names(tmp_path) == ["a"]
    assert any(TEMPORARY_MARK in p.name for p in tmp_path.iterdir())
    storage.remove_temporary_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_unknown_or_missing_file_system_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"nope://x: Protocol not known"):
        storage.exists("nope://x")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="s3fs"):
            storage.read_bytes("s3://bucket/x")


@pytest.mark.parametrize(
    ("path", "names", "joined"),
    [
        ("a", ("b", "c"), "a/b/c"),
        ("/", ("b",), "/b"),
        ("s3://bucket/", ("a/", "b"), "s3://bucket/a/b"),
        ("memory://", ("a",), "memory://a"),
        (Path("x"), (), "x"),
    ],
)
def test_paths_and_urls_are_joined_alike(path: storage.AnyPath, names: tuple[str, ...], joined: str) -> None:
    assert storage.join(path, *names) == joined


def test_urls_are_distinguished_from_local_paths() -> None:
    assert [storage.is_url(p) for p in ("s3://a", "a", "/a:b", "file:///a", "C:x", "a::b")] == [
        True, False, False, False, False, True,
    ]  # fmt: skip
    assert storage.local_path("file:///a/b") == Path("/a/b")
    assert storage.local_path("s3://a") is None
