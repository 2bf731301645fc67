"""Ray clusters of several nodes on one machine, whose processes can be killed individually."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
from network_nodes import INTERFACE, Network, NetworkNode
from ray.cluster_utils import Cluster

_STORE_BYTES = 80_000_000
# Ray declares a node dead after 4 s without an answer; its default is 15 s and more.
_QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
_WORKER = "RayTrainWorker"  # part of the title that Ray gives to the process of a rank
_PORT = 6379
_STARTS_WITHIN_S = 60.0


def worker_processes() -> list[psutil.Process]:
    """The processes of the ranks on the cluster that this process started."""
    return [process for process in _descendants(psutil.Process()) if _is_rank(process)]


class ChaosCluster(ABC):
    """A context: a head without CPUs for ranks, and nodes with one CPU each."""

    address: str
    driver_prefix: tuple[str, ...] = ()  # of the command that starts a driver
    settings: dict[str, Any]  # for the section `cluster` of a run's configuration

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exc_info: object) -> None: ...

    @abstractmethod
    def add_node(self) -> None: ...

    @abstractmethod
    def nodes(self) -> list[Any]:
        """The nodes that can run ranks, without the head."""

    @abstractmethod
    def processes(self, node: Any) -> list[psutil.Process]:
        """All processes on the node, including the raylet."""

    @abstractmethod
    def forget(self, node: Any) -> None:
        """Drop a node that is dead or about to die from `nodes`."""

    def choose_node(self, rng: random.Random) -> Any:
        """A random node with a rank, or any node if no rank runs."""
        ranks = {process.pid for process in worker_processes()}
        busy = [node for node in self.nodes() if ranks & {process.pid for process in self.processes(node)}]
        return rng.choice(busy or self.nodes())

    def kill_node(self, rng: random.Random) -> None:
        """Kill all processes of a node at once."""
        node = self.choose_node(rng)
        _kill(self.processes(node))
        self.forget(node)

    def kill_raylet(self, rng: random.Random) -> None:
        """Kill a node's raylet, without which its ranks must not go on."""
        node = self.choose_node(rng)
        _kill([process for process in self.processes(node) if process.name() == "raylet"])
        self.forget(node)


class ProcessCluster(ChaosCluster):
    """A cluster whose nodes share one address: ray.cluster_utils.Cluster."""

    def __init__(self, num_nodes: int) -> None:
        self.settings = {}
        head = {"num_cpus": 0, "object_store_memory": _STORE_BYTES, "_system_config": _QUICK_HEALTH_CHECKS}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(num_nodes):
            self.add_node()
        self._cluster.wait_for_nodes()
        self.address = str(self._cluster.address)

    def add_node(self) -> None:
        self._cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES)

    def nodes(self) -> list[Any]:
        return list(self._cluster.worker_nodes)

    def processes(self, node: Any) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
            return [*_descendants(raylet), raylet]
        return []

    def forget(self, node: Any) -> None:
        self._cluster.remove_node(node, allow_graceful=False)

    def announce_removal(self, node: Any, *, notice_s: int) -> None:
        """Announce to Ray that a node will leave in `notice_s`, as clouds do for spot instances."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}"]
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=chaos"]
        options = [*reason, f"--node-id={node.node_id}", f"--deadline-remaining-seconds={notice_s}"]
        subprocess.run([*command, *options], check=True, capture_output=True)

    def kill_head(self) -> None:
        """Kill the head and all nodes, which cannot go on without it."""
        for node in self._cluster.list_all_nodes():
            _kill(self.processes(node))
        self._cluster.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._cluster.shutdown()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Machine:
    node: NetworkNode
    ray: "subprocess.Popen[bytes]"  # runs outside of the node's namespaces, its children inside


class NetworkCluster(ChaosCluster):
    """A cluster whose nodes have their own address, process ids and network link. Needs root."""

    def __init__(self, num_nodes: int, folder: Path, environ: Mapping[str, str]) -> None:
        self.settings = {"network_interface": INTERFACE}
        self._environ = dict(environ)
        self._folder = folder
        self._network = Network(folder)
        self._machines: list[_Machine] = []
        self._ray_processes: list[subprocess.Popen[bytes]] = []
        self._num_nodes = num_nodes

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._network)
            undo.callback(self._kill_all)
            self._start_all()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._undo.close()

    def _start_all(self) -> None:
        head = self._network.add_node(
            has_own_processes=False
        )  # Ray requires that a driver there finds itself in /proc
        self.address = f"{head.address}:{_PORT}"
        self.driver_prefix = tuple(head.command_prefix(with_processes=False))
        health_checks = f"--system-config={json.dumps(_QUICK_HEALTH_CHECKS)}"
        self._start(head, "--head", f"--port={_PORT}", "--include-dashboard=false", health_checks)
        for _ in range(self._num_nodes):
            self.add_node()

    def _kill_all(self) -> None:
        """Kill every process that was started, also on nodes that were dropped."""
        for process in self._ray_processes:
            if process.poll() is None:
                _kill([*_descendants(psutil.Process(process.pid)), psutil.Process(process.pid)])
                process.wait()

    def add_node(self) -> None:
        self._machines.append(self._start(self._network.add_node(), f"--address={self.address}"))

    def nodes(self) -> list[_Machine]:
        return list(self._machines)

    def processes(self, node: _Machine) -> list[psutil.Process]:
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [*_descendants(psutil.Process(node.node.pid)), psutil.Process(node.node.pid)]
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [*_descendants(psutil.Process(node.ray.pid)), psutil.Process(node.ray.pid)]
        return found

    def forget(self, node: _Machine) -> None:
        self._machines.remove(node)

    def disconnect(self, rng: random.Random) -> _Machine:
        """Take a node's network link down; its processes go on."""
        machine = self.choose_node(rng)
        assert isinstance(machine, _Machine)
        machine.node.set_link(is_up=False)
        return machine

    def reconnect(self, machine: _Machine) -> None:
        """Take the link up again, after which the node ends itself: Ray has declared it dead for good."""
        machine.node.set_link(is_up=True)
        machine.ray.wait(timeout=_STARTS_WITHIN_S)
        self.forget(machine)

    def _start(self, node: NetworkNode, *options: str) -> _Machine:
        log = (self._folder / f"{node.name}.log").open("wb")
        num_cpus = 0 if "--head" in options else 1
        node_options = [
            f"--num-cpus={num_cpus}",
            f"--node-ip-address={node.address}",
            "--disable-usage-stats",
        ]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options, *node_options]
        prefix = node.command_prefix(with_processes=num_cpus > 0)
        with log:
            store = f"--object-store-memory={_STORE_BYTES}"
            process = subprocess.Popen(
                [*prefix, *command, store], env=self._environ, stdout=log, stderr=subprocess.STDOUT
            )
        self._ray_processes.append(process)
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while b"Ray runtime started" not in Path(log.name).read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"No Ray on {node.name}: {Path(log.name).read_text()}")
            time.sleep(0.1)
        return _Machine(node=node, ray=process)


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        return _WORKER in process.cmdline()[0]
    return False


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
