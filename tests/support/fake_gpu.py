"""A GPU without hardware: a queue of work, in virtual time, and events that complete when it reaches them."""

import json
import threading
from collections import deque

import torch

from distft.watch.device_clock import CudaClock


class FakeGpu:
    """One stream of a GPU. The host enqueues work with `launch`; the device does it in `run`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.started_collective = ""  # of NCCL, that is not completed
        self._queue: deque[FakeEvent | float] = deque()  # events, and seconds of work
        self._lock = threading.Lock()

    def launch(self, seconds: float) -> None:
        """Enqueue a kernel; of an infinite one the device never comes to the end."""
        with self._lock:
            self._queue.append(seconds)

    def run(self, seconds: float) -> None:
        """Let virtual time pass: the device works on its queue, and then idles."""
        with self._lock:
            end_s = self.now_s + seconds
            self._complete_events()
            while self._queue and self.now_s < end_s:
                work = self._queue.popleft()
                assert not isinstance(work, FakeEvent)
                done = min(work, end_s - self.now_s)
                self.now_s += done
                if done < work:
                    self._queue.appendleft(work - done)
                self._complete_events()
            self.now_s = end_s

    def record(self, event: "FakeEvent") -> None:
        with self._lock:
            self._queue.append(event)
            self._complete_events()

    def _complete_events(self) -> None:
        while self._queue and isinstance(self._queue[0], FakeEvent):
            event = self._queue.popleft()
            assert isinstance(event, FakeEvent)
            event.reached_s = self.now_s

    def collectives(self) -> bytes:
        """As torch's flight recorder writes them; one collective was started and completed earlier."""
        group, _, number = self.started_collective.partition(" ")
        entry = {"profiling_name": group, "collective_seq_id": int(number or 0), "state": "started"}
        return json.dumps(
            {
                "entries": [entry] if group else [],
                "pg_status": {"0": {"last_started_collective": "1"}},
            }
        ).encode()


class FakeEvent:
    """The methods of `torch.cuda.Event` with timing; like CUDA, it measures only between completed events."""

    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.reached_s: float | None = None

    def record(self) -> None:
        self._gpu.record(self)

    def query(self) -> bool:
        return self.reached_s is not None

    def elapsed_time(self, end_event: "FakeEvent", /) -> float:
        if self.reached_s is None or end_event.reached_s is None:
            raise RuntimeError("CUDA error: device not ready")
        return 1000 * (end_event.reached_s - self.reached_s)


class FakeGpuClock(CudaClock):
    """The clock of a fake GPU."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__(torch.device("cuda", 0), lambda: FakeEvent(gpu), gpu.collectives)

    def enter_thread(self) -> None:
        """There is no device to choose."""
