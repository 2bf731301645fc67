"""Ray clusters of several nodes on one machine, whose processes can be killed one by one."""

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
# A node that is silent for 4 s is dead; Ray's own patience is 15 s and more.
_QUICK_VERDICTS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}
_WORKER = "RayTrainWorker"  # in what Ray calls the process of a rank
_PORT = 6379
_STARTS_WITHIN_S = 60.0


def worker_processes() -> list[psutil.Process]:
    """The processes of the ranks that run now on the cluster that this process started."""
    return [process for process in _descendants(psutil.Process()) if _is_rank(process)]


class ChaosCluster(ABC):
    """A head without room for ranks, and nodes with room for one each; a context."""

    address: str
    driver_prefix: tuple[str, ...] = ()  # what a driver's command starts with
    settings: dict[str, Any]  # of `cluster:`, that runs on it need

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exc_info: object) -> None: ...

    @abstractmethod
    def add_node(self) -> None: ...

    @abstractmethod
    def nodes(self) -> list[Any]:
        """Those for ranks."""

    @abstractmethod
    def processes(self, node: Any) -> list[psutil.Process]:
        """All that run on the node, the raylet with them."""

    @abstractmethod
    def forget(self, node: Any) -> None:
        """It is dead, or soon will be."""

    def with_a_rank(self, choice: random.Random) -> Any:
        """Any node that has one; any at all where none has."""
        ranks = {process.pid for process in worker_processes()}
        busy = [node for node in self.nodes() if ranks & {process.pid for process in self.processes(node)}]
        return choice.choice(busy or self.nodes())

    def kill_node(self, choice: random.Random) -> None:
        """Every process of a node, at once."""
        node = self.with_a_rank(choice)
        _kill(self.processes(node))
        self.forget(node)

    def kill_raylet(self, choice: random.Random) -> None:
        """Only what manages the node: ranks must not work on without it."""
        node = self.with_a_rank(choice)
        _kill([process for process in self.processes(node) if process.name() == "raylet"])
        self.forget(node)


class ProcessCluster(ChaosCluster):
    """All nodes have the same address: ray.cluster_utils.Cluster."""

    def __init__(self, num_nodes: int) -> None:
        self.settings = {}
        head = {"num_cpus": 0, "object_store_memory": _STORE_BYTES, "_system_config": _QUICK_VERDICTS}
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

    def announce_end(self, node: Any, *, notice_s: int) -> None:
        """Tell Ray that a node will be taken away, as clouds do of their cheap ones."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self.address}"]
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=chaos"]
        options = [*reason, f"--node-id={node.node_id}", f"--deadline-remaining-seconds={notice_s}"]
        subprocess.run([*command, *options], check=True, capture_output=True)

    def kill_head(self) -> None:
        """And the nodes with it: none of them can go on."""
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
    ray: "subprocess.Popen[bytes]"  # outside of the node's processes, its children inside


class NetworkCluster(ChaosCluster):
    """Every node has an address, processes and a network cable of its own. Needs root."""

    def __init__(self, num_nodes: int, folder: Path, environ: Mapping[str, str]) -> None:
        self.settings = {"network_interface": INTERFACE}
        self._environ = dict(environ)
        self._folder = folder
        self._network = Network(folder)
        self._machines: list[_Machine] = []
        self._started: list[subprocess.Popen[bytes]] = []
        self._num_nodes = num_nodes

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._network)
            undo.callback(self._end)
            self._begin()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._undo.close()

    def _begin(self) -> None:
        head = self._network.add_node(has_own_processes=False)  # a driver there must find itself in /proc
        self.address = f"{head.address}:{_PORT}"
        self.driver_prefix = tuple(head.within(with_processes=False))
        verdicts = f"--system-config={json.dumps(_QUICK_VERDICTS)}"
        self._start(head, "--head", f"--port={_PORT}", "--include-dashboard=false", verdicts)
        for _ in range(self._num_nodes):
            self.add_node()

    def _end(self) -> None:
        """Whatever was started, on nodes that are forgotten, too."""
        for process in self._started:
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

    def cut_off(self, choice: random.Random) -> _Machine:
        """Pull a node's cable out; what runs there goes on."""
        machine = self.with_a_rank(choice)
        assert isinstance(machine, _Machine)
        machine.node.set_cable(is_plugged_in=False)
        return machine

    def plug_in(self, machine: _Machine) -> None:
        """Once Ray has given a node up it does not take it back: it ends itself, and another has to come."""
        machine.node.set_cable(is_plugged_in=True)
        machine.ray.wait(timeout=_STARTS_WITHIN_S)
        self.forget(machine)

    def _start(self, node: NetworkNode, *options: str) -> _Machine:
        log = (self._folder / f"{node.name}.log").open("wb")
        num_cpus = 0 if "--head" in options else 1
        own = [f"--num-cpus={num_cpus}", f"--node-ip-address={node.address}", "--disable-usage-stats"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options, *own]
        within = node.within(with_processes=num_cpus > 0)
        with log:
            store = f"--object-store-memory={_STORE_BYTES}"
            process = subprocess.Popen(
                [*within, *command, store], env=self._environ, stdout=log, stderr=subprocess.STDOUT
            )
        self._started.append(process)
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
