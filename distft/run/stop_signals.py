"""SIGTERM and Ctrl-C ask a run to save and stop; a second Ctrl-C ends it at once."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from distft.errors import Interrupted
from distft.train.services import StopReason, StopRequested

_UNWIND_S = 5.0  # for a process that a second Ctrl-C ends, to close its trackers and leave its block


@contextmanager
def stop_on_signals(
    stop_requested: StopRequested, *, on_request: Callable[[], None] = lambda: None
) -> Iterator[StopRequested]:
    """Within the block, SIGTERM and SIGINT do not end the process: the yielded function returns "requested".

    Before a signal, it returns the result of `stop_requested`. `on_request` is called at the first signal, in
    another thread. A second SIGINT raises `KeyboardInterrupt`; if the main thread is blocked in native code,
    such as a collective, so that the block does not end, the process ends with `Interrupted`'s exit code.

    Only the main thread of a process can handle signals: in another thread, as in a Ray worker, they keep
    their effect. SIGINT also keeps it where it is ignored, as in a shell's background.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested
        return
    handler = _Handler(stop_requested)
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, handler.handle) for number in numbers}
    try:
        with _watching(on_request):
            yield handler.reason
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class _Handler:
    def __init__(self, stop_requested: StopRequested) -> None:
        self._stop_requested = stop_requested
        self._is_requested = False

    def reason(self) -> StopReason | None:
        return "requested" if self._is_requested else self._stop_requested()

    def handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Runs in the main thread, between two instructions of Python."""
        if self._is_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._is_requested = True


@contextmanager
def _watching(on_request: Callable[[], None]) -> Iterator[None]:
    """Within the block, a thread hears the signals, even while the main thread is blocked in native code.

    It calls `on_request` at the first one, and ends the process if a second SIGINT does not end the block.
    """
    has_ended = threading.Event()
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    def watch() -> None:
        heard = b""
        while not has_ended.is_set():
            news = os.read(read_end, 64).replace(b"\0", b"")
            if news and not heard:
                on_request()
            heard += news
            if len(heard) > 1 and news.count(signal.SIGINT) and not has_ended.wait(_UNWIND_S):
                print("Interrupted while waiting for other ranks or a device.", file=sys.stderr, flush=True)
                os._exit(Interrupted.exit_code)

    watcher = threading.Thread(target=watch, name="distft-signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        has_ended.set()
        signal.set_wakeup_fd(before)
        os.write(write_end, b"\0")
        watcher.join()
        os.close(read_end)
        os.close(write_end)
