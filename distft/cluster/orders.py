"""Why running workers are to save and end: the driver asks, a node leaves, or there is room for more."""

import contextlib
import threading
import time
from typing import Any

import ray

from distft.cluster.room import draining_nodes, nodes_now, resources_per_worker, room_for
from distft.run.cluster import ClusterConfig
from distft.train.loop import StopReason

_LOOK_EVERY_S = 1.0
# So long Ray may not know of a new node: workers that ended sooner would start again as few.
_RAY_COUNTS_EVERY_S = 20.0


class Orders:
    """`with Orders(...) as orders:` watches from a thread of rank 0; `orders.reason` is asked by the loop."""

    def __init__(self, mailbox: Any, cluster: ClusterConfig, world_size: int) -> None:
        self._mailbox = mailbox
        self._cluster = cluster
        self._world_size = world_size
        self._reason: StopReason | None = None
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="orders", daemon=True)

    def __enter__(self) -> "Orders":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._has_ended.set()
        self._thread.join()

    def reason(self) -> StopReason | None:
        """Why to end at the next step where all ranks listen; None: go on."""
        return self._reason

    def _watch(self) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # driver or cluster are gone; others tell of it
            in_vain = ray.get(self._mailbox.started.remote(self._world_size))
            next_look = time.monotonic() + self._cluster.grow_check_s
            roomy_since = float("inf")
            while not self._has_ended.wait(_LOOK_EVERY_S):
                if ray.get(self._mailbox.is_stop_asked.remote()):
                    self._reason = "asked"
                    return
                if (leaving := draining_nodes()) and leaving & ray.get(
                    self._mailbox.nodes.remote(self._world_size)
                ):
                    self._reason = "drain"
                    return
                if self._world_size < self._cluster.max_workers and time.monotonic() >= next_look:
                    next_look = time.monotonic() + self._cluster.grow_check_s
                    _, free = nodes_now()
                    spare = room_for(resources_per_worker(self._cluster), free)
                    roomy_since = min(roomy_since, time.monotonic()) if spare > in_vain else float("inf")
                    if time.monotonic() - roomy_since > _RAY_COUNTS_EVERY_S:
                        ray.get(self._mailbox.growing.remote(self._world_size, spare))
                        self._reason = "resize"
                        return
