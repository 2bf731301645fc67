"""A Ray cluster of several nodes on one machine, whose processes can be killed one by one."""

import contextlib
import random
import signal
from typing import Any, Self

import psutil
from ray.cluster_utils import Cluster

_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}
# A node that is silent for 4 s is dead; Ray's own patience is 15 s and more.
_QUICK_VERDICTS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
_WORKER = "RayTrainWorker"  # in what Ray calls the process of a rank


def worker_processes() -> list[psutil.Process]:
    """The processes of the ranks that run now on the cluster that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if _WORKER in process.cmdline()[0]:
                found.append(process)
    return found


class ProcessCluster:
    """A head without room for ranks, and nodes with room for one each; a context."""

    def __init__(self, num_nodes: int) -> None:
        head = {"num_cpus": 0, "object_store_memory": 80_000_000, "_system_config": _QUICK_VERDICTS}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(num_nodes):
            self.add_node()
        self._cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add_node(self) -> None:
        self._cluster.add_node(**_NODE)

    def kill_node(self, choice: random.Random) -> None:
        """Every process of a node, at once."""
        node = choice.choice(self._with_a_rank())
        raylet = _raylet(node)
        for process in [*raylet.children(recursive=True), raylet]:
            process.send_signal(signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_raylet(self, choice: random.Random) -> None:
        """Only what manages the node: ranks must not work on without it."""
        node = choice.choice(self._with_a_rank())
        _raylet(node).send_signal(signal.SIGKILL)

    def _with_a_rank(self) -> list[Any]:
        ranks = {process.pid for process in worker_processes()}
        nodes = list(self._cluster.worker_nodes)
        return [node for node in nodes if ranks & {child.pid for child in _children(node)}] or nodes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._cluster.shutdown()


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _children(node: Any) -> list[psutil.Process]:
    try:
        return list(_raylet(node).children(recursive=True))
    except psutil.NoSuchProcess:
        return []
