"""Decides when workers must save and end: a stop request, a leaving node, or room for more workers."""

import contextlib
import threading
import time
from typing import Any

import ray

from distft.cluster.driver.resources import node_resources, num_workers_that_fit, resources_per_worker
from distft.cluster.ray_internals import draining_node_ids
from distft.run.cluster_config import ClusterConfig
from distft.train.services import StopReason

_POLL_S = 1.0
# The time that Ray needs to register a new node: workers that end sooner would restart without it.
_NODE_REGISTRATION_S = 20.0


class StopMonitor:
    """Within its block, a thread of rank 0 checks for a reason to stop; the training loop calls `reason`."""

    def __init__(self, mailbox: Any, cluster: ClusterConfig, world_size: int) -> None:
        self._mailbox = mailbox
        self._cluster = cluster
        self._world_size = world_size
        self._reason: StopReason | None = None
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._monitor, name="stop_monitor", daemon=True)

    def __enter__(self) -> "StopMonitor":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._has_ended.set()
        self._thread.join()

    def reason(self) -> StopReason | None:
        """Why the run must save and end; None to go on."""
        return self._reason

    def _monitor(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # driver or cluster is gone; others report it
            # Ray may not place workers although resources are free: do not try the same growth again.
            num_failed_to_add = ray.get(self._mailbox.workers_started.remote(self._world_size))
            next_check = time.monotonic() + self._cluster.grow_check_s
            free_since = float("inf")
            while not self._has_ended.wait(_POLL_S):
                if ray.get(self._mailbox.is_stop_requested.remote()):
                    self._reason = "requested"
                    return
                if self._is_node_leaving():
                    self._reason = "drain"
                    return
                if self._world_size < self._cluster.max_workers and time.monotonic() >= next_check:
                    next_check = time.monotonic() + self._cluster.grow_check_s
                    _, free = node_resources()
                    num_more = num_workers_that_fit(resources_per_worker(self._cluster), free)
                    can_grow = num_more > num_failed_to_add
                    free_since = min(free_since, time.monotonic()) if can_grow else float("inf")
                    if time.monotonic() - free_since > _NODE_REGISTRATION_S:
                        ray.get(self._mailbox.growth_requested.remote(self._world_size, num_more))
                        self._reason = "resize"
                        return

    def _is_node_leaving(self) -> bool:
        leaving = draining_node_ids()
        return bool(leaving) and bool(leaving & ray.get(self._mailbox.node_ids.remote(self._world_size)))
