"""The actor through which driver and workers exchange messages and rank 0's output reaches the driver.

The driver prints the output line by line as it was written, without Ray's prefixes.
"""

import asyncio
import contextlib
import io
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal, TextIO

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Stream = Literal["stdout", "stderr"]


class Mailbox:
    """An actor that stores rank 0's unread output, the request to stop, and whether and where workers run."""

    def __init__(self) -> None:
        self._output: asyncio.Queue[tuple[Stream, str] | None] = asyncio.Queue()
        self._is_stop_requested = False
        self._has_ever_started = False
        self._nodes: dict[int, str] = {}  # by rank
        self._idle_since: float | None = time.monotonic()  # None while workers run
        self._last_growth = (0, 0)  # world size before, and number of additional workers expected

    async def request_stop(self) -> None:
        """Ask the run to save and end."""
        self._is_stop_requested = True

    async def is_stop_requested(self) -> bool:
        return self._is_stop_requested

    async def workers_started(self, world_size: int) -> int:
        """Record a start. Returns how many workers the last resize failed to add; 0 if it added any."""
        self._idle_since, self._has_ever_started = None, True
        size_before, num_expected = self._last_growth
        return num_expected if world_size <= size_before else 0

    async def has_ever_started(self) -> bool:
        """Whether workers ever trained for this driver."""
        return self._has_ever_started

    async def growth_requested(self, world_size: int, num_expected: int) -> None:
        """Record that `world_size` workers end because `num_expected` more seem to fit."""
        self._last_growth = (world_size, num_expected)

    async def workers_ended(self) -> None:
        """Record that no workers run any more."""
        if self._idle_since is None:
            self._idle_since = time.monotonic()

    async def idle_s(self) -> float:
        """For how long no workers have run; 0 while they do."""
        return 0.0 if self._idle_since is None else time.monotonic() - self._idle_since

    async def rank_joined(self, rank: int, node_id: str) -> None:
        """Record the node of a rank; replaces an earlier one."""
        self._nodes[rank] = node_id

    async def node_ids(self, world_size: int) -> set[str]:
        """Ids of the nodes on which ranks below `world_size` run."""
        return {node_id for rank, node_id in self._nodes.items() if rank < world_size}

    async def write(self, stream: Stream, text: str) -> None:
        """Queue `text` for the driver's `stream`."""
        self._output.put_nowait((stream, text))

    async def close(self) -> None:
        """Queue the end of the output."""
        self._output.put_nowait(None)

    async def read(self) -> list[tuple[Stream, str] | None]:
        """Wait for output and return all that is queued; None marks the end."""
        found = [await self._output.get()]
        while not self._output.empty():
            found.append(self._output.get_nowait())
        return found


@contextlib.contextmanager
def open_mailbox() -> Iterator[Any]:
    """Start a `Mailbox` actor on this node; print its output here, all of it before the block ends."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=this_node).remote()
    printer = threading.Thread(target=_print_output, args=(mailbox,), daemon=True)
    printer.start()
    try:
        yield mailbox
    finally:
        mailbox.close.remote()
        printer.join(timeout=10)


def _print_output(mailbox: Any) -> None:
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone; the driver reports that
        while True:
            for item in ray.get(mailbox.read.remote()):
                if item is None:
                    return
                stream, text = item
                streams[stream].write(text)
                streams[stream].flush()


@contextlib.contextmanager
def forward_output(mailbox: Any) -> Iterator[None]:
    """Within the block, send whole lines of this process's stdout and stderr to `mailbox` as well."""
    stdout = _ForwardedStream(sys.stdout, mailbox, "stdout")
    stderr = _ForwardedStream(sys.stderr, mailbox, "stderr")
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            yield
    finally:
        stdout.finish()
        stderr.finish()


class _ForwardedStream(io.TextIOBase):
    """A text stream that writes to `original` and sends each whole line to a mailbox."""

    def __init__(self, original: TextIO, mailbox: Any, stream: Stream) -> None:
        self._original = original
        self._mailbox = mailbox
        self._stream: Stream = stream
        self._unsent = ""
        self._lock = threading.Lock()  # libraries print from their own threads

    def write(self, text: str, /) -> int:
        self._original.write(text)
        with self._lock:
            lines, newline, self._unsent = (self._unsent + text).rpartition("\n")
            if newline:
                self._mailbox.write.remote(self._stream, lines + newline)
        return len(text)

    def flush(self) -> None:
        self._original.flush()

    def writable(self) -> bool:
        return True

    def finish(self) -> None:
        """Send an unfinished line, and wait until all output has arrived."""
        ray.get(self._mailbox.write.remote(self._stream, self._unsent + "\n" if self._unsent else ""))
        self._unsent = ""
