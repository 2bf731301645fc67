"""Heartbeats: the phase, own work and Python stack of a rank's training thread."""

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

_NUM_SENT_FRAMES = 8
_NUM_WAIT_FRAMES = 4  # a blocked collective is at most this far from the innermost Python frame
_COLLECTIVE_PATHS = ("torch/distributed/", "deepspeed/comm/")


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnWork:
    """A rank's work in complete steps since its start, without the time it waited for other ranks."""

    num_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    """One sign of life of a rank."""

    number: int  # of this rank's heartbeats, ascending
    position: int  # phases entered so far; all ranks enter the same phases in the same order
    step: int  # in progress
    phase: Phase
    work: OwnWork
    is_waiting: bool  # in a collective, by the stack
    frames: tuple[str, ...]  # "file:line function", the innermost last

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> Self:
        record = json.loads(text)
        work = OwnWork(**record.pop("work"))
        return cls(**{**record, "work": work, "frames": tuple(record["frames"])})


class HeartbeatRecorder:
    """Records the progress of the thread that creates it, the training thread; any thread may read it."""

    def __init__(self) -> None:
        self._thread_id = threading.get_ident()
        # Always replaced as a whole, so that another thread never reads a partial update.
        self._current = Heartbeat(
            number=0, position=0, step=0, phase="start", work=OwnWork(), is_waiting=False, frames=()
        )
        self._step_s = 0.0  # own work of the step in progress
        self._step_tokens = 0

    @contextmanager
    def phase(self, phase: Phase, *, step: int | None = None) -> Iterator[None]:
        """Run the block in `phase`, then enter the previous phase again; `step` is the step that now begins.

        If the block raises, the phase stays, so that it shows where this rank failed.
        """
        outer = self._current.phase
        self._enter(phase, step)
        yield
        self._enter(outer)

    @contextmanager
    def own_work(self, num_tokens: int = 0) -> Iterator[None]:
        """Count the block's time as own work on `num_tokens` tokens. It must not wait for other ranks."""
        started = perf_counter()
        yield
        self._step_s += perf_counter() - started
        self._step_tokens += num_tokens

    def finish_step(self) -> None:
        """Add the step's own work to the totals and enter "after the step"."""
        total = self._current.work
        work = OwnWork(
            num_steps=total.num_steps + 1,
            num_tokens=total.num_tokens + self._step_tokens,
            seconds=total.seconds + self._step_s,
        )
        self._step_s, self._step_tokens = 0.0, 0
        self._current = replace(self._current, work=work)
        self._enter("after the step")

    def end(self) -> None:
        """Enter the last phase, "end": this rank has finished training."""
        self._enter("end")

    def heartbeat(self, number: int) -> Heartbeat:
        """A heartbeat of this moment, with the training thread's stack."""
        frames = _stack(sys._current_frames().get(self._thread_id))
        return replace(
            self._current,
            number=number,
            is_waiting=any(_is_wait(frame) for frame in frames[-_NUM_WAIT_FRAMES:]),
            frames=tuple(_format(frame) for frame in frames[-_NUM_SENT_FRAMES:]),
        )

    def _enter(self, phase: Phase, step: int | None = None) -> None:
        last = self._current
        self._current = replace(
            last, position=last.position + 1, phase=phase, step=last.step if step is None else step
        )


def _stack(frame: FrameType | None) -> list[tuple[PurePath, int, str]]:
    """File, line and function of each frame, the innermost last."""
    frames = []
    while frame is not None:
        frames.append((PurePath(frame.f_code.co_filename), frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    return frames[::-1]


def _is_wait(frame: tuple[PurePath, int, str]) -> bool:
    path, _, function = frame
    text = path.as_posix()
    is_collective = any(folder in text for folder in _COLLECTIVE_PATHS)
    return is_collective or ("/deepspeed/" in text and function == "wait")


def _format(frame: tuple[PurePath, int, str]) -> str:
    path, line, function = frame
    return f"{'/'.join(path.parts[-3:])}:{line} {function}"
