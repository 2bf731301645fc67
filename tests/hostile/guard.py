"""Runs a reader on a hostile file in a process of its own, and reports what the reader did.

The process may open only what it needs (the interpreter, the project, and the directories that the caller
names), and neither connect a socket, start a process, unpickle, nor execute code from those directories. It
has limits on memory, time and the size of a file. One server imports the readers once and forks for each call
(about 20 ms a call).

    outcome = guard.run("hostile.readers:open_checkpoint", str(model), directories=[model])
    outcome.check()  # no violation, and a result or one of distft's own errors

The audit hook sees what Python opens. Files that a C++ library opens by itself it does not see.
"""

import contextlib
import importlib
import io
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

MEMORY_MB = 400  # above what the server has; torch's threads and a CLI's imports need up to 150 of it
SECONDS = 20.0
_SYSTEM_PATHS = ("/usr/lib", "/usr/local/lib", "/usr/share/zoneinfo", "/lib", "/sys", "/proc/self")
_SYSTEM_FILES = (
    *("/dev/null", "/dev/zero", "/dev/urandom", "/dev/shm"),
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat"),
)
_CODE_ENDINGS = (".py", ".pyc", ".pyd", ".so", ".pth")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = frozenset(  # events with one path that they change
    ["os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "os.chown", "os.utime", "os.mkfifo"]
)
_PAIRS = frozenset(["os.rename", "os.link", "os.symlink"])
_FORBIDDEN = (
    "subprocess.",
    "socket.",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.kill",
    "pty.",
    "urllib.",
    "ftplib.",
    "smtplib.",
    "webbrowser.",
    "pickle.find_class",
)
_HARMLESS = frozenset(["socket.__new__", "os.fork_child"])  # event loops of asyncio make socket pairs


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a call did."""

    returned: Any = None  # a JSON value; its repr if it is none
    error: str | None = None  # class name of the exception, None if it returned
    is_distft_error: bool = False
    exit_code: int | None = None  # of distft's error
    message: str = ""
    chain: tuple[str, ...] = ()  # classes of the exception and of those that it was raised for
    traceback: str = ""
    output: str = ""  # stdout and stderr
    violations: tuple[str, ...] = ()
    timed_out: bool = False
    signal: int | None = None  # that ended the process
    seconds: float = 0.0
    added_mb: float = 0.0  # resident memory, at its peak

    @property
    def is_refused(self) -> bool:
        """Whether it ended in one of distft's own errors."""
        return self.is_distft_error

    def check(self) -> None:
        """Raise `AssertionError` unless it returned or raised a `DistftError`, within all limits."""
        assert not self.violations, f"{self.violations}\n{self.message}"
        assert not self.timed_out, f"not done after {self.seconds:.0f} s\n{self.output}"
        assert self.signal is None, f"ended by signal {self.signal}\n{self.output}"
        assert self.error is None or self.is_distft_error, self.traceback
        # A reader that catches MemoryError has asked for memory that it does not have.
        assert "MemoryError" not in self.chain, f"{self.chain}\n{self.traceback}"
        assert "can't allocate memory" not in self.traceback, self.traceback

    def check_refused(self, *words: str) -> None:
        """As `check`, and it raised a `DistftError` whose message contains each of `words`."""
        self.check()
        assert self.is_distft_error, f"accepted: {self.returned!r}\n{self.output}"
        for word in words:
            assert word in self.message, f"{word!r} is not in: {self.message}"


class Guard:
    """A fork server; use it as a context manager, one call at a time."""

    def __enter__(self) -> "Guard":
        tests = Path(__file__).resolve().parent.parent
        path = os.pathsep.join([str(tests), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "hostile.guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
            text=True,
            cwd=tests.parent,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)

    def run(
        self,
        function: str,
        *arguments: Any,
        directories: Sequence[str | Path] = (),
        writable: Sequence[str | Path] = (),
        memory_mb: int = MEMORY_MB,
        seconds: float = SECONDS,
    ) -> Outcome:
        """Call `function` ("module:name", both importable from `tests`) with JSON arguments.

        It may read `directories` and `writable`, and write `writable`; the working directory is the first of
        them. Import what it needs at the top of its module: that is done once, before the limits apply.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "function": function,
            "arguments": arguments,
            "directories": [str(Path(path).resolve()) for path in directories],
            "writable": [str(Path(path).resolve()) for path in writable],
            "memory_mb": memory_mb,
            "seconds": seconds,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        if "server_error" in answer:
            raise AssertionError(answer["server_error"])
        answer |= {key: tuple(answer[key]) for key in ("chain", "violations") if key in answer}
        return Outcome(**answer)


class _Violation(BaseException):
    """Raised by the audit hook; no reader catches it by accident."""


class _AuditHook:
    """Refuses what a reader must not do, and remembers it."""

    def __init__(self, directories: Sequence[str], writable: Sequence[str]) -> None:
        system = {sys.prefix, sys.base_prefix, *filter(None, sys.path), *_SYSTEM_PATHS, *_SYSTEM_FILES}
        self._system = (*tuple(os.path.realpath(path) for path in system), f"/proc/{os.getpid()}")
        self._data = (*directories, *writable)
        self._writable = (*writable, "/dev/null", "/dev/shm")
        self.violations: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool((flags or 0) & _WRITES) or (isinstance(mode, str) and set(mode) & set("wax+"))
            self._check_path(event, path, self._writable if writes else (*self._system, *self._data))
            if isinstance(path, str) and path.endswith(_CODE_ENDINGS) and self._is_below(path, self._data):
                self._refuse(f"code is read from {path}")
        elif event in {"os.listdir", "os.scandir"}:
            self._check_path(
                event, "." if arguments[0] is None else arguments[0], (*self._system, *self._data)
            )
        elif event in _CHANGES:
            self._check_path(event, arguments[0], self._writable)
        elif event in _PAIRS:
            for path in arguments[1:2] if event == "os.symlink" else arguments[:2]:
                self._check_path(event, path, self._writable)
        elif event == "ctypes.dlopen":
            if isinstance(arguments[0], str) and self._is_below(arguments[0], self._data):
                self._refuse(f"{event} {arguments[0]}")
        elif event.startswith(_FORBIDDEN) and event not in _HARMLESS:
            self._refuse(f"{event} {str(arguments)[:300]}")

    def _check_path(self, event: str, path: Any, allowed: Sequence[str]) -> None:
        if isinstance(path, int) or path is None:
            return
        name = os.fsdecode(path)
        if not self._is_below(name, allowed):
            self._refuse(f"{event} {name}")

    def _is_below(self, path: str, directories: Sequence[str]) -> bool:
        real = os.path.realpath(path)
        return any(real == top or real.startswith(top.rstrip("/") + "/") for top in directories)

    def _refuse(self, what: str) -> NoReturn:
        self.violations.append(what)
        raise _Violation(what)


def _serve() -> None:
    """Answer requests, one JSON object a line, until the input ends."""
    import distft.errors  # noqa: F401 - not under the limits of the first call

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module prints when it is imported is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            module, _, name = request["function"].partition(":")
            function = getattr(importlib.import_module(module), name)
            answer = _fork(function, request)
        except Exception:
            answer = {"server_error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _fork(function: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The fields of the call's `Outcome`."""
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        os.close(reader)
        _run_child(function, request, writer)
    os.close(writer)
    data, timed_out = b"", False
    while True:
        left = started + request["seconds"] - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            timed_out = True
            os.kill(pid, signal.SIGKILL)
            break
        part = os.read(reader, 1 << 16)
        if not part:
            break
        data += part
    os.close(reader)
    _, status, _ = os.wait4(pid, 0)
    answer: dict[str, Any] = {"timed_out": timed_out, "seconds": time.monotonic() - started}
    if not timed_out:
        answer |= json.loads(data) if data else {"error": "no result", "traceback": "no result"}
        answer["signal"] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return answer


def _run_child(function: Any, request: dict[str, Any], writer: int) -> NoReturn:
    """Call the function under the limits, write the outcome to `writer`, and end the process."""
    code = 1
    try:
        output = io.StringIO()
        hook = _AuditHook(request["directories"], request["writable"])
        if top := next(iter((*request["writable"], *request["directories"])), None):
            os.chdir(top)
        resident_kb = _limit(request["memory_mb"])
        sys.addaudithook(hook)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            answer = _call(function, request["arguments"])
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        answer |= {
            "violations": hook.violations,
            "output": output.getvalue()[-20_000:],
            "added_mb": max(peak_kb - resident_kb, 0) / 1024,
        }
        data = json.dumps(answer).encode()
        while data:
            data = data[os.write(writer, data) :]
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def _limit(memory_mb: int) -> int:
    """Limit address space and file size; returns the resident memory so far, in KiB."""
    pages = [int(word) for word in Path("/proc/self/statm").read_text().split()[:2]]
    size, resident = (count * resource.getpagesize() for count in pages)
    limit = size + (memory_mb << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return resident // 1024


def _call(function: Any, arguments: Sequence[Any]) -> dict[str, Any]:
    from distft.errors import DistftError

    try:
        returned = function(*arguments)
    except BaseException as error:
        chain: list[str] = []
        link: BaseException | None = error
        while link is not None and len(chain) < 30:
            chain.append(type(link).__name__)
            link = link.__cause__ or link.__context__
        return {
            "error": type(error).__name__,
            "is_distft_error": isinstance(error, DistftError),
            "exit_code": getattr(error, "exit_code", None),
            "message": str(error)[:20_000],
            "chain": chain,
            "traceback": "".join(traceback.format_exception(error))[-8000:],
        }
    try:
        json.dumps(returned)
    except (TypeError, ValueError):
        returned = repr(returned)[:2000]
    return {"returned": returned}


if __name__ == "__main__":
    _serve()
