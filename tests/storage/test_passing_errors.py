"""Errors of a disk or a network file system that may pass: reads are tried again, and are never damage."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distft import storage
from distft.errors import StorageError, UnreachableError
from distft.storage import errors
from distft.storage.local import LocalReader

PASSING = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN]
READS: dict[str, Callable[[Path], Any]] = {
    "read_bytes": storage.read_bytes,
    "read_range": lambda path: storage.read_range(path, 0, 4),
    "size": storage.size,
    "exists": storage.exists,
    "is_directory": storage.is_directory,
    "version": storage.version,
    "list_names": lambda path: storage.list_names(path.parent),
    "list_sizes": lambda path: storage.list_sizes(path.parent),
    "verify": lambda path: storage.verify(path, checksum=storage.checksum_of_bytes(b"content")),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "RETRY_WAITS_S", (0.0, 0.0))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"content")
    return path


def _fail(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int, times: float) -> list[str]:
    """Let the first `times` calls below `folder` that open, look up or list fail; returns those calls."""
    failed: list[str] = []

    def failing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if str(path).startswith(str(folder)) and len(failed) < times:
                failed.append(name)
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *args, **options)

        return call

    for module, name in ((os, "open"), (os, "stat"), (os, "listdir"), (os, "scandir"), (io, "open")):
        monkeypatch.setattr(module, name, failing(name, getattr(module, name)))
    return failed


@pytest.mark.parametrize("number", PASSING, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", READS)
def test_a_read_is_tried_again_after_an_error_that_passes(
    file: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    expected = READS[name](file)
    failed = _fail(monkeypatch, file.parent, number, times=2)
    assert READS[name](file) == expected
    assert len(failed) == 2


@pytest.mark.parametrize("name", READS)
def test_an_error_that_does_not_pass_is_unreachable_and_not_damage(
    file: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    failed = _fail(monkeypatch, file.parent, errno.EIO, times=float("inf"))
    with pytest.raises(UnreachableError, match=r"failed: Input/output error\. Check the disk"):
        READS[name](file)
    assert len(failed) == 3


def test_a_file_that_is_being_read_goes_on_where_the_error_came(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(5 << 20)
    file.write_bytes(content)
    real, calls = io.FileIO.readinto, []

    class Flaky(io.FileIO):
        def readinto(self, buffer: Any, /) -> int | None:
            calls.append(self.tell())
            if len(calls) % 3 == 2:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return real(self, buffer)

    monkeypatch.setattr("distft.storage.local._open_for_reading", lambda path: Flaky(path, "rb"))
    with storage.open_read(file) as opened:
        parts = iter(lambda: opened.read(1 << 19), b"")
        assert b"".join(parts) == content
    assert len(calls) > len(set(calls)) >= 4  # some places were read twice


def test_a_reader_can_be_positioned_and_has_a_descriptor(file: Path) -> None:
    with LocalReader(file) as reader:
        assert reader.seek(3) == reader.tell() == 3
        assert reader.readall() == b"tent"
        assert os.fstat(reader.fileno()).st_size == 7
    assert reader.closed


def test_a_file_without_read_permission_is_not_damaged(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail(monkeypatch, file.parent, errno.EACCES, times=float("inf"))
    with pytest.raises(UnreachableError, match="Give this user the right to read it"):
        storage.verify(file, checksum="xxh3:0")


def test_a_missing_file_and_a_directory_in_its_place_are_damage(file: Path) -> None:
    for path, message in ((file.parent / "none", "is missing"), (file.parent, "is not a file")):
        with pytest.raises(StorageError, match=message) as caught:
            storage.verify(path, checksum="xxh3:0")
        assert not isinstance(caught.value, UnreachableError)
