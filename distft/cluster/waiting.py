"""The driver's watch over a run that Ray Train drives: it does not wait for ever, and hears SIGTERM."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray

from distft.cluster.room import nodes_now, there_is, wanted
from distft.errors import LaunchError
from distft.run.cluster import ClusterConfig

_LOOK_EVERY_S = 1.0
_TELL_EVERY_S = 30.0
_HEARD_WITHIN_S = 5.0


class Patience:
    """Ends `fit()` of this process's main thread when no workers have run for `start_timeout_s`."""

    def __init__(self, mailbox: Any, cluster: ClusterConfig) -> None:
        self.verdict: LaunchError | None = None
        self._mailbox = mailbox
        self._cluster = cluster
        self._is_stop_asked = False
        self._has_ended = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block the watch stands, and SIGTERM lets the workers save and end."""
        thread = threading.Thread(target=self._watch, name="patience", daemon=True)
        thread.start()
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        if is_main:
            signal.signal(signal.SIGTERM, self._ask_stop)
        try:
            yield
        finally:
            self._has_ended.set()
            thread.join()
            if is_main:
                for number, handler in before.items():  # Ray Train leaves its own for SIGINT
                    signal.signal(number, handler)

    def _ask_stop(self, number: int, frame: object) -> None:  # noqa: ARG002
        self._is_stop_asked = True

    def _watch(self) -> None:
        told_s, is_stop_sent = 0.0, False
        with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone, and fit() tells of it
            while not self._has_ended.wait(_LOOK_EVERY_S):
                if self._is_stop_asked and not is_stop_sent:
                    ray.get(self._mailbox.ask_stop.remote())
                    is_stop_sent = True
                idle_s = ray.get(self._mailbox.idle_s.remote())
                if idle_s >= self._cluster.start_timeout_s:
                    self.verdict = LaunchError(f"{self._lack()} Ask for less, add nodes, or wait longer.")
                    self._interrupt()
                    return
                if idle_s - told_s > _TELL_EVERY_S:
                    told_s = idle_s
                    print(f"{self._lack()} Still waiting.", flush=True)
                told_s = min(told_s, idle_s)

    def _interrupt(self) -> None:
        """End `fit()`. Ray Train's controller may be too busy to hear the first; at the third it is left."""
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            if self._has_ended.wait(_HEARD_WITHIN_S):
                return

    def _lack(self) -> str:
        waited_s = ray.get(self._mailbox.idle_s.remote())
        return (
            f"No workers for {waited_s:.0f} s (cluster.start_timeout_s={self._cluster.start_timeout_s:g}): "
            f"asked for are {wanted(self._cluster)}; there are {there_is(*nodes_now())}."
        )
