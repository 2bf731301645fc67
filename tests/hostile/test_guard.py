"""The guard itself: it finds each thing that a reader must not do."""

import os
from pathlib import Path

import pytest

from hostile.guard import Guard

HERE = "hostile.test_guard:"


def read(path: str) -> int:
    return len(Path(path).read_bytes())


def swallow(path: str) -> str:
    try:
        Path(path).read_bytes()
    except Exception:
        return "swallowed"
    return "read"


def write(path: str) -> None:
    Path(path).write_text("x")


def connect() -> None:
    import socket

    socket.create_connection(("127.0.0.1", 9), timeout=1)


def start_process() -> None:
    os.system("true")


def unpickle() -> object:
    import pickle

    return pickle.loads(b"cposix\nsystem\n.")


def import_module(name: str) -> None:
    import importlib
    import sys

    sys.path.insert(0, str(Path.cwd()))
    importlib.import_module(name)


def allocate(num_mb: int) -> int:
    try:
        return len(bytearray(num_mb << 20))
    except MemoryError:
        from distft.errors import DataError

        raise DataError("too large") from None


def wait(path: str) -> None:
    Path(path).read_bytes()


def crash() -> None:
    os.abort()


def test_a_reader_may_read_its_directory_only(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "file").write_text("four")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    directories = [tmp_path / "data"]
    outcome = guard.run(HERE + "read", "file", directories=directories)
    outcome.check()
    assert outcome.returned == 4
    for path in ("../secret", "link", "/etc/hostname"):
        for function in ("read", "swallow"):
            outcome = guard.run(HERE + function, path, directories=directories)
            assert outcome.violations, path
    assert guard.run(HERE + "write", "file", directories=directories).violations
    guard.run(HERE + "write", "file", writable=directories).check()


@pytest.mark.parametrize("function", ["connect", "start_process", "unpickle"])
def test_sockets_processes_and_pickles_are_violations(guard: Guard, function: str) -> None:
    assert guard.run(HERE + function).violations


def test_code_of_the_directory_is_not_executed(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "hostile_code.py").write_text("1 / 0")
    assert guard.run(HERE + "import_module", "hostile_code", directories=[tmp_path]).violations


def test_memory_time_and_crashes_are_limited_and_told(guard: Guard, tmp_path: Path) -> None:
    guard.run(HERE + "allocate", 50).check()
    with pytest.raises(AssertionError, match=r"DataError.*MemoryError"):
        guard.run(HERE + "allocate", 600).check()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(AssertionError, match="not done after 1 s"):
        guard.run(HERE + "wait", "fifo", directories=[tmp_path], seconds=1).check()
    with pytest.raises(AssertionError, match="signal 6"):
        guard.run(HERE + "crash").check()
    with pytest.raises(AssertionError, match="FileNotFoundError"):
        guard.run(HERE + "read", "missing", directories=[tmp_path]).check()
