"""What a rank's training thread is doing, as it says itself and as its Python stack shows."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from time import perf_counter
from types import FrameType
from typing import Literal, Self

Phase = Literal[
    "start", "data", "forward", "backward and update", "after the step", "evaluation", "save", "end"
]

_SHOWN_FRAMES = 8
_WAITING_FRAMES = 4  # a collective is blocked in is at most this far above the innermost Python frame
_WAITS = ("torch/distributed/", "deepspeed/comm/")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a rank did by itself in whole steps, without waiting for others; totals since its start."""

    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """One sign of life."""

    number: int  # counts the rank's beats: another number is another sign
    position: int  # phases entered so far; every rank goes through the same ones in the same order
    step: int  # the one that is being made
    phase: Phase
    work: Work
    is_waiting: bool  # for other ranks, as far as the stack shows
    frames: tuple[str, ...]  # "file:line function", the innermost last

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> Self:
        record = json.loads(text)
        work = Work(**record.pop("work"))
        return cls(**{**record, "work": work, "frames": tuple(record["frames"])})


class Pulse:
    """Written by the thread that makes it, which is the one that trains; read by any."""

    def __init__(self) -> None:
        self._thread_id = threading.get_ident()
        # Replaced as a whole, so that a reader never sees half of a change.
        self._now = Beat(
            number=0, position=0, step=0, phase="start", work=Work(), is_waiting=False, frames=()
        )
        self._own_s = 0.0
        self._num_tokens = 0

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Another phase begins; `step` is the one that is being made from here on, if it is another."""
        before = self._now
        self._now = replace(
            before, position=before.position + 1, phase=phase, step=before.step if step is None else step
        )

    @contextmanager
    def own_work(self, num_tokens: int = 0) -> Iterator[None]:
        """The block is work on `num_tokens` tokens in which no other rank is waited for."""
        started = perf_counter()
        yield
        self._own_s += perf_counter() - started
        self._num_tokens += num_tokens

    def finish_step(self) -> None:
        """The own work so far made one optimizer step."""
        done = self._now.work
        work = Work(
            num_steps=done.num_steps + 1,
            num_tokens=done.num_tokens + self._num_tokens,
            seconds=done.seconds + self._own_s,
        )
        self._own_s, self._num_tokens = 0.0, 0
        self._now = replace(self._now, work=work)
        self.enter("after the step")

    def beat(self, number: int) -> Beat:
        """How it stands now."""
        frames = _stack(sys._current_frames().get(self._thread_id))
        return replace(
            self._now,
            number=number,
            is_waiting=any(_is_wait(frame) for frame in frames[-_WAITING_FRAMES:]),
            frames=tuple(_short(frame) for frame in frames[-_SHOWN_FRAMES:]),
        )


def _stack(frame: FrameType | None) -> list[tuple[PurePath, int, str]]:
    frames = []
    while frame is not None:
        frames.append((PurePath(frame.f_code.co_filename), frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return frames[::-1]


def _is_wait(frame: tuple[PurePath, int, str]) -> bool:
    path, _, function = frame
    text = path.as_posix()
    return any(part in text for part in _WAITS) or ("/deepspeed/" in text and function == "wait")


def _short(frame: tuple[PurePath, int, str]) -> str:
    path, line, function = frame
    return f"{'/'.join(path.parts[-3:])}:{line} {function}"
