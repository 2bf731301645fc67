"""Records every change to a directory and makes the k-th one fail: crash, torn write, full disk or SIGKILL.

It patches `os` and `open`, below `distft.storage`. `test_crash_safety` compares its record with the
interpreter's audit events, so that no change goes unnoticed.
"""

import builtins
import errno
import io
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from distft.errors import DistftError
from distft.storage.local import TEMPORARY_MARK

How = Literal["die", "torn", "full", "kill"]

_ON_A_PATH = ("mkdir", "rmdir", "unlink", "remove", "truncate")
_ON_TWO_PATHS = ("rename", "replace", "link", "symlink")
_ON_A_DESCRIPTOR = ("fsync", "fdatasync", "ftruncate", "write", "pwrite", "writev", "pwritev")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEEDS_SPACE = {"mkdir", "rename", "replace", "link", "symlink", "open", "write"}  # and the fsync of a file


class Died(BaseException):
    """A simulated crash of the process: later operations, including clean-up, have no effect."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One change of the disk; `path` is the target."""

    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.kind} {self.path}"


class FaultyDisk:
    """In a `with` block, records every change below `root` and fails from operation `fail_at` on.

    die: that operation and all later ones raise `Died`. torn: the same, but half of its bytes are written.
    full: later operations that need space raise ENOSPC, the others work. kill: SIGKILL to this process.
    """

    def __init__(self, root: Path, *, fail_at: int | None = None, how: How = "die") -> None:
        self.operations: list[Operation] = []
        self._root = str(root)
        self._fail_at = fail_at
        self._how = how
        self._has_failed = False
        self._lock = threading.Lock()
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "FaultyDisk":
        for name in _ON_A_PATH:
            self._patch.setattr(os, name, self._on_a_path(name, getattr(os, name)))
        for name in _ON_TWO_PATHS:
            self._patch.setattr(os, name, self._on_two_paths(name, getattr(os, name)))
        for name in _ON_A_DESCRIPTOR:
            self._patch.setattr(os, name, self._on_a_descriptor(name, getattr(os, name)))
        self._patch.setattr(os, "open", self._os_open(os.open))
        for module in (io, builtins):
            self._patch.setattr(module, "open", self._open(io.open))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._patch.undo()

    def record(self, kind: str, path: str, *, is_file_sync: bool = False) -> bool:
        """Record an operation before it happens, or fail. True: write half of the bytes, then call again."""
        if not path.startswith(self._root):
            return False
        with self._lock:
            fails_now = self._fail_at == len(self.operations) and not self._has_failed
            self._has_failed |= fails_now
            if self._has_failed and self._how == "torn" and fails_now and kind == "write":
                return True
            if self._has_failed and self._how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self._has_failed and self._how in {"die", "torn"}:
                raise Died(f"{kind} {path}")
            if self._has_failed and (kind in _NEEDS_SPACE or is_file_sync):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            self.operations.append(Operation(kind, path))
        return False

    def _on_a_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(path: Any, *args: Any, dir_fd: int | None = None, **options: Any) -> Any:
            self.record("unlink" if name == "remove" else name, _full(path, dir_fd))
            if dir_fd is not None:
                options["dir_fd"] = dir_fd
            return real(path, *args, **options)

        return operation

    def _on_two_paths(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(source: Any, target: Any, **options: Any) -> Any:
            self.record("replace" if name == "rename" else name, _full(target, options.get("dst_dir_fd")))
            return real(source, target, **options)

        return operation

    def _on_a_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(descriptor: int, *args: Any) -> Any:
            path = _full("", descriptor)
            is_sync = name.endswith("sync")
            self.record("fsync" if is_sync else "write", path, is_file_sync=is_sync and os.path.isfile(path))  # noqa: PTH113
            return real(descriptor, *args)

        return operation

    def _os_open(self, real: Callable[..., int]) -> Callable[..., int]:
        def operation(path: Any, flags: int, *args: Any, dir_fd: int | None = None, **options: Any) -> int:
            if flags & _WRITES:
                self.record("open", _full(path, dir_fd))
            return real(path, flags, *args, dir_fd=dir_fd, **options)

        return operation

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+") or not _full(file).startswith(self._root):
                return real(file, mode, buffering, *args, **options)
            assert mode in {"wb", "ab", "r+b"}, f"{mode=} is not supported here"
            self.record("open", _full(file))
            opened = _CountedFile(file, self, mode)
            size = buffering if buffering > 1 else 1 << 13
            return io.BufferedRandom(opened, size) if mode == "r+b" else io.BufferedWriter(opened, size)

        return operation


class _CountedFile(io.FileIO):
    def __init__(self, path: Any, disk: FaultyDisk, mode: str) -> None:
        super().__init__(path, mode)
        self._disk = disk
        self._path = _full(path)

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        if self._disk.record("write", self._path):
            super().write(view[: len(view) // 2])
            self._disk.record("write", self._path)
        return super().write(view)


def _full(path: Any, descriptor: int | None = None) -> str:
    below = os.fsdecode(path)
    if descriptor is None:
        return os.path.abspath(below)  # noqa: PTH100 - keeps links as they are
    return os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), below).rstrip("/")  # noqa: PTH118, PTH115


def names_in(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def temporary_files_in(root: Path) -> list[str]:
    return [name for name in names_in(root) if TEMPORARY_MARK in name]


def error_of(call: Callable[[], object]) -> BaseException | None:
    try:
        call()
    except (Died, DistftError) as error:
        return error
    return None
