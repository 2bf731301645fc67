"""Metrics and events as JSON lines in the run's directory."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from distft import storage
from distft.config import redact
from distft.errors import ConfigError, StorageError
from distft.tracker.interface import Metrics, finite_or_none, plain_number

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
BEGINS = ("start", "resume")  # kinds of events
_LOCK_S = 5.0  # for a lock that is held for milliseconds


class LineWriter:
    """Appends JSON objects to a file, one line and one write each: a crash can tear only the last line."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        is_torn = path.exists() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        if is_torn:
            self._write(b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        """Raises `StorageError` when the disk is full."""
        text = json.dumps({k: _json_value(v) for k, v in record.items()}, ensure_ascii=False, allow_nan=False)
        self._write(text.encode("utf-8", "backslashreplace") + b"\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process is in such a block; one that was stopped in it is not waited for."""
        give_up_s = time.monotonic() + _LOCK_S
        while time.monotonic() < give_up_s:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.01)
        try:
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        """Fsync and close. A second call does nothing."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            raise _unwritable(self.path, error) from error


class JsonlTracker:
    """`metrics.jsonl`: one object per line, `{"step": 40, "time": ..., "loss": ...}`; NaN, infinity are null.

    `evaluations.jsonl` likewise has what evaluations found besides metrics, if they found any of it.

    On a resume, lines after the resumed step are dropped, so every step appears once, also if an earlier
    start of the run still writes: it keeps the old file.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lines: LineWriter | None = None
        self._evaluations_path = Path()
        self._evaluations: LineWriter | None = None

    def start(
        self,
        run_id: str,  # noqa: ARG002
        config: Mapping[str, Any],  # noqa: ARG002
        run_dir: Path,
        *,
        resume_step: int | None = None,
    ) -> None:
        path = Path(run_dir) / METRICS_FILE
        self._evaluations_path = Path(run_dir) / EVALUATIONS_FILE
        drop_lines_after(path, resume_step)
        drop_lines_after(self._evaluations_path, resume_step)
        self._lines = LineWriter(path)

    def log(self, metrics: Metrics, *, step: int) -> None:
        if self._lines is None:
            raise RuntimeError("log() before start()")
        numbers = {name: plain_number(value) for name, value in metrics.items()}
        self._lines.append({"step": step, "time": round(self._clock(), 3), **numbers})

    def show(self, record: Mapping[str, Any], *, step: int) -> None:
        if self._evaluations is None:
            self._evaluations = LineWriter(self._evaluations_path)
        self._evaluations.append({"step": step, "time": round(self._clock(), 3), **record})

    def event(self, kind: str, **fields: Any) -> None:
        """Does nothing: `EventLog` writes events to `events.jsonl`."""

    def finish(self, status: str) -> None:  # noqa: ARG002
        for lines in (self._lines, self._evaluations):
            if lines is not None:
                lines.close()


class EventLog:
    """`events.jsonl`: the events of all attempts of a run; lines are never dropped.

    A line is `{"time": seconds since 1970, "kind": "resume", ...}`, without secrets. Several processes may
    append.
    """

    def __init__(self, run_dir: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lines = LineWriter(Path(run_dir) / EVENTS_FILE)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event. Raises `StorageError` when the disk is full."""
        self._lines.append({"time": round(self._clock(), 3), "kind": kind, **redact(fields)})

    def write_once(self, kind: str, key: Mapping[str, Any], *, since: float, **fields: Any) -> None:
        """Append one event with `key` and `fields`, unless the file has one with this `key`.

        Events before the time `since` do not count. Of several processes that try, one writes it. Raises
        `StorageError` when the disk is full.
        """
        with self._lines.locked():
            records = read_lines(self._lines.path)
            same = {"kind": kind, **redact(key)}
            if not any(
                record.get("time", 0.0) >= since and all(record.get(k) == v for k, v in same.items())
                for record in records
            ):
                self.write(kind, **key, **fields)

    def close(self) -> None:
        self._lines.close()


def drop_lines_after(path: Path, resume_step: int | None) -> None:
    """Replace `path`, atomically, by a copy without torn lines and lines after `resume_step` (None: all)."""
    if not path.exists():
        return
    try:
        with storage.open_write(path) as file:
            for line, is_kept in _classify_lines(path, resume_step):
                if is_kept:
                    file.write(line)
    except OSError as error:
        raise _unwritable(path, error) from error


def last_logged_step(run_dir: Path) -> int:
    """The last step in the run's `metrics.jsonl`; 0 without one."""
    steps = (record.get("step") for record in read_lines(run_dir / METRICS_FILE))
    return max((step for step in steps if isinstance(step, int)), default=0)


def status_of_last_start(events: Sequence[Mapping[str, Any]]) -> str | None:
    """What `finish` said of a run's last start; None: it goes on, or ended without a word."""
    for event in reversed(events):
        if event.get("kind") == "finish":
            return str(event.get("status", "ended"))
        if event.get("kind") in BEGINS:
            break
    return None


def read_lines(path: Path, *, limit: int | None = None) -> list[dict[str, Any]]:
    """The objects in the first `limit` lines of JSON (None: all), without torn ones; none without a file.

    Raises `ConfigError` if it is no file, or may not be read.
    """
    if not path.exists():
        return []
    try:
        with path.open("rb") as file:
            return [record for line in islice(file, limit) if (record := parse_line(line)) is not None]
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path}: cannot write a line ({error.strerror}). Free some space there, then start the run "
        "again: it resumes from its last checkpoint."
    )


def _classify_lines(path: Path, resume_step: int | None) -> Iterator[tuple[bytes, bool]]:
    with path.open("rb") as file:
        for line in file:
            step = (parse_line(line) or {}).get("step")
            yield line, resume_step is not None and isinstance(step, int) and step <= resume_step


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object in a line of JSON; None if it is torn, or no object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # the latter: a line of brackets
        return None
    return record if isinstance(record, dict) and line.endswith(b"\n") else None


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def _json_value(value: Any) -> Any:
    """A field of an event as plain JSON; unknown types become text."""
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json_value(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return finite_or_none(value)
    try:
        return finite_or_none(plain_number(value))
    except (TypeError, ValueError):
        return str(value)
