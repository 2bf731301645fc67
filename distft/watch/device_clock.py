"""How far a device has come with the work that the host enqueued for it. Nothing here waits for it."""

import contextlib
import json
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point in the work of a device, after all that had been enqueued when the mark was made."""

    def is_reached(self) -> bool:
        """Whether the device has come to this point."""

    def seconds_since(self, earlier: Any) -> float:
        """The device's time from `earlier` to this mark, both of which it has reached."""


class DeviceClock(Protocol):
    """Marks points in the work of one device. One thread makes the marks; any may ask about them."""

    def mark(self) -> Mark: ...

    def enter_thread(self) -> None:
        """Called once by each further thread that asks."""

    def collective_in_progress(self) -> str | None:
        """The collective that the device has begun and not completed; "" if none, None if unknown."""


class HostMark:
    """A CPU is its own device: it has done all that came before."""

    def __init__(self) -> None:
        self._at_s = perf_counter()

    def is_reached(self) -> bool:
        return True

    def seconds_since(self, earlier: "HostMark") -> float:
        return self._at_s - earlier._at_s


class HostClock:
    """The `DeviceClock` of a CPU."""

    def mark(self) -> HostMark:
        return HostMark()

    def enter_thread(self) -> None:
        pass

    def collective_in_progress(self) -> None:
        return None


class CudaEvent(Protocol):
    """The methods of `torch.cuda.Event` that are used."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end_event: Any, /) -> float: ...


class CudaMark:
    """An event on the training thread's stream."""

    def __init__(self, event: CudaEvent) -> None:
        self._event = event
        event.record()

    def is_reached(self) -> bool:
        with contextlib.suppress(RuntimeError):  # a failed device: the training thread will raise it
            return self._event.query()
        return False

    def seconds_since(self, earlier: "CudaMark") -> float:
        return earlier._event.elapsed_time(self._event) / 1000


class CudaClock:
    """The `DeviceClock` of a GPU: CUDA events on the compute stream, and what torch records about NCCL."""

    def __init__(
        self,
        device: torch.device,
        make_event: Callable[[], CudaEvent] | None = None,
        read_collectives: Callable[[], bytes] | None = None,
    ) -> None:
        """Without the two functions: CUDA's events, and torch's flight recorder."""
        self._device = device
        self._make_event = _timed_event if make_event is None else make_event
        self._read_collectives = _read_flight_recorder if read_collectives is None else read_collectives

    def mark(self) -> CudaMark:
        return CudaMark(self._make_event())

    def enter_thread(self) -> None:
        # A thread starts on device 0, and would make a context there, of half a gigabyte.
        torch.cuda.set_device(self._device)

    def collective_in_progress(self) -> str | None:
        return find_started_collective(json.loads(self._read_collectives()))


def device_clock(device: torch.device) -> DeviceClock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


def _timed_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _read_flight_recorder() -> bytes:
    """The collectives of NCCL that are not completed, as JSON. Their state is read from CUDA events."""
    dump: Callable[..., bytes] = getattr(
        torch._C._distributed_c10d,
        "_dump_nccl_trace_json",
        lambda **_: b"{}",  # a torch without NCCL
    )
    return dump(includeCollectives=True, onlyActive=True)


def find_started_collective(record: Mapping[str, Any]) -> str | None:
    """The first collective in torch's flight recorder that has started; "" if none, None if unknown.

    An enqueued collective starts when the stream has come to it, and completes when all ranks have. torch
    records the start only with TORCH_NCCL_ENABLE_TIMING=1.
    """
    for entry in record.get("entries", ()):
        if entry["state"] == "started":
            return f"{entry['profiling_name']} number {entry['collective_seq_id']}"
    statuses = record.get("pg_status", {}).values()
    is_timed = any(int(status["last_started_collective"]) >= 0 for status in statuses)
    return "" if is_timed else None
