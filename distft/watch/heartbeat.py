"""Heartbeats: the phase, own work and Python stack of a rank's training thread."""

import json
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from types import FrameType
from typing import Literal, Self

from distft.watch.device_clock import DeviceClock, HostClock, Mark

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
    position: int  # phases entered so far by the device; all ranks enter the same ones in the same order
    step: int  # in progress
    phase: Phase
    work: OwnWork
    is_waiting: bool  # for other ranks: the host by its stack, or the device if it is behind the host
    device: str  # what the device is in, if it is behind the host; else empty
    frames: tuple[str, ...]  # "file:line function", the innermost last

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes) -> Self:
        record = json.loads(text)
        work = OwnWork(**record.pop("work"))
        return cls(**{**record, "work": work, "frames": tuple(record["frames"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class _Point:
    """What the training thread does from a mark on."""

    position: int
    step: int
    phase: Phase
    change: Literal["phase", "own work begins", "own work ends", "step ends"] = "phase"
    num_tokens: int = 0  # of the own work that ends


class HeartbeatRecorder:
    """Records the progress of the thread that creates it, the training thread; any thread may read it.

    On a GPU the training thread is ahead of the device. A heartbeat shows how far the device has come, since
    the ranks' devices wait for each other, and own work is the device's time.
    """

    def __init__(self, clock: DeviceClock | None = None) -> None:
        self._thread_id = threading.get_ident()
        self._clock = HostClock() if clock is None else clock
        self._entered = _Point(position=0, step=0, phase="start")  # by the training thread
        self._lock = threading.Lock()  # for what follows
        self._pending: deque[tuple[Mark, _Point]] = deque()  # not reached by the device, in order
        self._reached = self._entered  # by the device
        self._own_work_began: Mark | None = None  # while the device is in own work
        self._work = OwnWork()
        self._step_s = 0.0  # own work of the step in progress
        self._step_tokens = 0
        self._last_position = -1  # of the last heartbeat

    @contextmanager
    def phase(self, phase: Phase, *, step: int | None = None) -> Iterator[None]:
        """Run the block in `phase`, then enter the previous phase again; `step` is the step that now begins.

        If the block raises, the phase stays, so that it shows where this rank failed.
        """
        outer = self._entered.phase
        self._enter(phase, step)
        yield
        self._enter(outer)

    @contextmanager
    def own_work(self, num_tokens: int = 0) -> Iterator[None]:
        """Count the block's time as own work on `num_tokens` tokens. It must not wait for other ranks."""
        self._record(replace(self._entered, change="own work begins"))
        yield
        self._record(replace(self._entered, change="own work ends", num_tokens=num_tokens))

    def finish_step(self) -> None:
        """Add the step's own work to the totals and enter "after the step"."""
        self._record(replace(self._entered, change="step ends"))
        self._enter("after the step")

    def end(self) -> None:
        """Enter the last phase, "end", at once: this rank has finished training, or failed."""
        with self._lock:
            self._pending.clear()
            self._entered = replace(self._entered, position=self._entered.position + 1, phase="end")
            self._reached = self._entered

    def enter_thread(self) -> None:
        """Called once by another thread before it takes heartbeats."""
        self._clock.enter_thread()

    def heartbeat(self, number: int) -> Heartbeat:
        """A heartbeat of this moment, with the training thread's stack."""
        frames = _stack(sys._current_frames().get(self._thread_id))
        with self._lock:
            self._advance()
            reached, work, is_behind = self._reached, self._work, bool(self._pending)
            is_own_work = self._own_work_began is not None
        # The host waits in a collective's frame; or, for its device, in some other frame.
        is_waiting, device = any(_is_wait(frame) for frame in frames[-_NUM_WAIT_FRAMES:]), ""
        if is_behind:
            is_waiting, device = self._state_of_device(is_own_work, reached.position == self._last_position)
        self._last_position = reached.position
        return Heartbeat(
            number=number,
            position=reached.position,
            step=reached.step,
            phase=reached.phase,
            work=work,
            is_waiting=is_waiting,
            device=device,
            frames=tuple(_format(frame) for frame in frames[-_NUM_SENT_FRAMES:]),
        )

    def _state_of_device(self, is_own_work: bool, is_unmoved: bool) -> tuple[bool, str]:
        """Whether the device, which is behind the host, waits for other ranks; and what it does, in words."""
        # The flight recorder is read only when needed: it copies its entries, a millisecond.
        collective = self._clock.collective_in_progress() if is_unmoved else None
        if collective is None:  # unknown: by the place in the step
            doing = "its own work" if is_own_work else "its own work or a collective"
            return not is_own_work, doing
        return bool(collective), collective or "its own work"

    def _enter(self, phase: Phase, step: int | None = None) -> None:
        last = self._entered
        self._entered = replace(
            last, position=last.position + 1, phase=phase, step=last.step if step is None else step
        )
        self._record(self._entered)

    def _record(self, point: _Point) -> None:
        mark = self._clock.mark()  # outside of the lock: on a GPU whose queue is full it blocks
        with self._lock:
            self._pending.append((mark, point))
            self._advance()

    def _advance(self) -> None:
        """Take over all points that the device has reached."""
        while self._pending and self._pending[0][0].is_reached():
            mark, point = self._pending.popleft()
            self._reached = point
            if point.change == "own work begins":
                self._own_work_began = mark
            elif point.change == "own work ends":
                assert self._own_work_began is not None
                self._step_s += mark.seconds_since(self._own_work_began)
                self._step_tokens += point.num_tokens
                self._own_work_began = None
            elif point.change == "step ends":
                self._add_step()

    def _add_step(self) -> None:
        total = self._work
        self._work = OwnWork(
            num_steps=total.num_steps + 1,
            num_tokens=total.num_tokens + self._step_tokens,
            seconds=total.seconds + self._step_s,
        )
        self._step_s, self._step_tokens = 0.0, 0


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
