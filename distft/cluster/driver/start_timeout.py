"""Ends a run whose workers do not start within `cluster.start_timeout_s`; forwards signals to workers."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import ray

from distft.cluster.driver.resources import describe_capacity, describe_request, node_resources
from distft.cluster.ray_internals import num_workers_placed
from distft.errors import DistftError, LaunchError, Preempted
from distft.run.cluster_config import ClusterConfig

_POLL_S = 1.0
_REPORT_EVERY_S = 30.0


class StartTimeout:
    """Interrupts the main thread's `fit()`, by `KeyboardInterrupt`, for a reason that is then in `error`.

    No workers have run for `start_timeout_s`, or a stop was requested before any ran. `error` is None after a
    second Ctrl-C.
    """

    def __init__(self, mailbox: Any, cluster: ClusterConfig) -> None:
        self.error: DistftError | None = None
        self._mailbox = mailbox
        self._cluster = cluster
        self._is_stop_requested = False
        self._has_ended = threading.Event()

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Within the block, apply the timeout; SIGTERM and Ctrl-C ask the workers to save and end.

        A second Ctrl-C raises `KeyboardInterrupt`.
        """
        thread = threading.Thread(target=self._monitor, name="start_timeout", daemon=True)
        thread.start()
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        if is_main:
            for number in before:
                signal.signal(number, self._request_stop)
        try:
            yield
        finally:
            self._has_ended.set()
            thread.join()
            if is_main:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _request_stop(self, number: int, frame: object) -> None:  # noqa: ARG002
        if number == signal.SIGINT and (self._is_stop_requested or self.error is not None):
            raise KeyboardInterrupt
        self._is_stop_requested = True

    def _monitor(self) -> None:
        reported_s, is_stop_sent = 0.0, False
        with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone, and fit() raises that
            while not self._has_ended.wait(_POLL_S):
                if self._is_stop_requested and not is_stop_sent:
                    ray.get(self._mailbox.request_stop.remote())
                    is_stop_sent = True
                    if not ray.get(self._mailbox.has_ever_started.remote()):
                        self.error = Preempted(
                            "Stopped as asked, before the workers started; start again to go on."
                        )
                        os.kill(os.getpid(), signal.SIGINT)
                        return
                    print(
                        "Asked the workers to save and to stop; the same command goes on from there. "
                        "A second Ctrl-C stops at once, without saving.",
                        file=sys.stderr,
                        flush=True,
                    )
                idle_s = ray.get(self._mailbox.idle_s.remote())
                if idle_s >= self._cluster.start_timeout_s:
                    self.error = LaunchError(" ".join(self._describe_wait()))
                    os.kill(os.getpid(), signal.SIGINT)
                    return
                if idle_s - reported_s > _REPORT_EVERY_S:
                    reported_s = idle_s
                    print(f"{self._describe_wait()[0]} Still waiting.", flush=True)
                reported_s = min(reported_s, idle_s)

    def _describe_wait(self) -> tuple[str, str]:
        """What the run waits for, and the remedy."""
        waited_s = ray.get(self._mailbox.idle_s.remote())
        waited = f"{waited_s:.0f} s (cluster.start_timeout_s={self._cluster.start_timeout_s:g})"
        if num_placed := num_workers_placed():
            wait = (
                f"The workers ({num_placed} so far) have a place, but have not begun to train for {waited}."
            )
            return wait, "Raise cluster.start_timeout_s."
        return (
            f"No workers for {waited}: the run requests {describe_request(self._cluster)}; the cluster has "
            f"{describe_capacity(*node_resources())}.",
            "Request less, add nodes, or raise cluster.start_timeout_s.",
        )
