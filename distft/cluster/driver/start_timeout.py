"""Ends a run whose workers do not start within `cluster.start_timeout_s`; forwards SIGTERM to workers."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray

from distft.cluster.driver.resources import describe_capacity, describe_request, node_resources
from distft.errors import LaunchError
from distft.run.cluster_config import ClusterConfig

_POLL_S = 1.0
_REPORT_EVERY_S = 30.0
_INTERRUPT_TIMEOUT_S = 5.0


class StartTimeout:
    """Interrupts the main thread's `fit()` once no workers have run for `start_timeout_s`.

    `error` is then the reason; it is None until then.
    """

    def __init__(self, mailbox: Any, cluster: ClusterConfig) -> None:
        self.error: LaunchError | None = None
        self._mailbox = mailbox
        self._cluster = cluster
        self._is_stop_requested = False
        self._has_ended = threading.Event()

    @contextlib.contextmanager
    def enforced(self) -> Iterator[None]:
        """Within the block, apply the timeout, and let SIGTERM ask the workers to save and end."""
        thread = threading.Thread(target=self._monitor, name="start_timeout", daemon=True)
        thread.start()
        is_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        if is_main:
            signal.signal(signal.SIGTERM, self._request_stop)
        try:
            yield
        finally:
            self._has_ended.set()
            thread.join()
            if is_main:
                for number, handler in before.items():  # Ray Train leaves its own for SIGINT
                    signal.signal(number, handler)

    def _request_stop(self, number: int, frame: object) -> None:  # noqa: ARG002
        self._is_stop_requested = True

    def _monitor(self) -> None:
        reported_s, is_stop_sent = 0.0, False
        with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone, and fit() raises that
            while not self._has_ended.wait(_POLL_S):
                if self._is_stop_requested and not is_stop_sent:
                    ray.get(self._mailbox.request_stop.remote())
                    is_stop_sent = True
                idle_s = ray.get(self._mailbox.idle_s.remote())
                if idle_s >= self._cluster.start_timeout_s:
                    self.error = LaunchError(
                        f"{self._describe_wait()} Request less, add nodes, or raise cluster.start_timeout_s."
                    )
                    self._interrupt()
                    return
                if idle_s - reported_s > _REPORT_EVERY_S:
                    reported_s = idle_s
                    print(f"{self._describe_wait()} Still waiting.", flush=True)
                reported_s = min(reported_s, idle_s)

    def _interrupt(self) -> None:
        """End `fit()`. A busy controller may miss the first SIGINT; the third ends `fit()` without it."""
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            if self._has_ended.wait(_INTERRUPT_TIMEOUT_S):
                return

    def _describe_wait(self) -> str:
        waited_s = ray.get(self._mailbox.idle_s.remote())
        return (
            f"No workers for {waited_s:.0f} s (cluster.start_timeout_s={self._cluster.start_timeout_s:g}): "
            f"the run requests {describe_request(self._cluster)}; the cluster has "
            f"{describe_capacity(*node_resources())}."
        )
