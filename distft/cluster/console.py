"""What driver and workers have to tell each other; what rank 0 prints, on the driver's own streams.

Text comes line by line as it was written, without Ray's marks.
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
    """Text on its way from workers to the driver, and word of how the workers are. An actor of its own."""

    def __init__(self) -> None:
        self._letters: asyncio.Queue[tuple[Stream, str] | None] = asyncio.Queue()
        self._is_stop_asked = False
        self._has_begun = False
        self._nodes: dict[int, str] = {}  # by rank
        self._idle_since: float | None = time.monotonic()
        self._refused = (0, 0)  # a world size, and the room for more that was in vain there

    async def ask_stop(self) -> None:
        """The run is to save and end."""
        self._is_stop_asked = True

    async def is_stop_asked(self) -> bool:
        return self._is_stop_asked

    async def started(self, world_size: int) -> int:
        """Workers have begun. Returns for how many more of them there seemed to be room, without success."""
        self._idle_since, self._has_begun = None, True
        before, spare = self._refused
        return spare if world_size <= before else 0

    async def joined(self, rank: int, node: str) -> None:
        """A rank runs there, until the same rank joins elsewhere."""
        self._nodes[rank] = node

    async def nodes(self, world_size: int) -> set[str]:
        """On which nodes the ranks run."""
        return {node for rank, node in self._nodes.items() if rank < world_size}

    async def has_begun(self) -> bool:
        """Whether workers ever trained for this driver."""
        return self._has_begun

    async def growing(self, world_size: int, spare: int) -> None:
        """Workers end because there is room for `spare` more."""
        self._refused = (world_size, spare)

    async def ended(self) -> None:
        """Workers are no more."""
        if self._idle_since is None:
            self._idle_since = time.monotonic()

    async def idle_s(self) -> float:
        """For how long no workers have been at it; 0 while they are."""
        return 0.0 if self._idle_since is None else time.monotonic() - self._idle_since

    async def write(self, stream: Stream, text: str) -> None:
        self._letters.put_nowait((stream, text))

    async def close(self) -> None:
        self._letters.put_nowait(None)

    async def read(self) -> list[tuple[Stream, str] | None]:
        """Everything that has come, once anything has; None stands for the end."""
        letters = [await self._letters.get()]
        while not self._letters.empty():
            letters.append(self._letters.get_nowait())
        return letters


@contextlib.contextmanager
def printed_mailbox() -> Iterator[Any]:
    """An actor of `Mailbox`, whose text is printed here until the block ends; all of it by then."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
    printer = threading.Thread(target=_print_letters, args=(mailbox,), daemon=True)
    printer.start()
    try:
        yield mailbox
    finally:
        mailbox.close.remote()
        printer.join(timeout=10)


def _print_letters(mailbox: Any) -> None:
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone, and the run tells of it
        while True:
            for letter in ray.get(mailbox.read.remote()):
                if letter is None:
                    return
                stream, text = letter
                streams[stream].write(text)
                streams[stream].flush()


@contextlib.contextmanager
def posted_to(mailbox: Any) -> Iterator[None]:
    """Within the block, what this process prints goes to `mailbox` too, in whole lines."""
    stdout = _Copied(sys.stdout, mailbox, "stdout")
    stderr = _Copied(sys.stderr, mailbox, "stderr")
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            yield
    finally:
        stdout.end()
        stderr.end()


class _Copied(io.TextIOBase):
    """A text stream whose lines are sent to a mailbox besides."""

    def __init__(self, beside: TextIO, mailbox: Any, stream: Stream) -> None:
        self._beside = beside
        self._mailbox = mailbox
        self._stream: Stream = stream
        self._unsent = ""
        self._lock = threading.Lock()  # libraries print from their own threads

    def write(self, text: str, /) -> int:
        self._beside.write(text)
        with self._lock:
            lines, newline, self._unsent = (self._unsent + text).rpartition("\n")
            if newline:
                self._mailbox.write.remote(self._stream, lines + newline)
        return len(text)

    def flush(self) -> None:
        self._beside.flush()

    def writable(self) -> bool:
        return True

    def end(self) -> None:
        """Send what is left, and wait until it has arrived."""
        ray.get(self._mailbox.write.remote(self._stream, self._unsent + "\n" if self._unsent else ""))
        self._unsent = ""
