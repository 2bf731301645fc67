"""Simulates machines by network, process and mount namespaces that share a switch. Needs root."""

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
_TOOLS = ("ip", "unshare", "nsenter", "mount")


def why_unavailable() -> str:
    """Why this machine cannot make such nodes; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    name = f"distft_{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "needs network namespaces, which this machine cannot make"
    _run("ip", "netns", "delete", name)
    return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkNode:
    """A node, which consists of the namespaces of process `pid`."""

    name: str
    address: str
    pid: int

    def command_prefix(self, *, with_processes: bool = True) -> list[str]:
        """The prefix of a command that runs on the node; it joins the process namespace on request."""
        namespaces = ["--net", "--mount", *(["--pid"] if with_processes else [])]
        return ["nsenter", f"--target={self.pid}", *namespaces, f"--wd={Path.cwd()}", "--"]

    def set_link(self, *, is_up: bool) -> None:
        _run("ip", "-n", self.name, "link", "set", INTERFACE, "up" if is_up else "down")


class Network:
    """A context: a switch and its nodes. Processes on the nodes end with it.

    Each node has an address in 10.231.7.0/24 on `INTERFACE`, and its own /tmp/ray, which is below `folder`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._switch = f"distft_{secrets.token_hex(3)}"
        self._num_nodes = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Network":
        Path("/tmp/ray").mkdir(exist_ok=True)
        self._make_namespace(self._switch)
        _run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", "switch", "up")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def add_node(self, *, has_own_processes: bool = True) -> NetworkNode:
        """Add a node. With `has_own_processes`, killing `pid` kills all processes of the node at once."""
        self._num_nodes += 1
        name, port = f"{self._switch}_{self._num_nodes}", f"port{self._num_nodes}"
        address = f"10.231.7.{self._num_nodes}"
        self._make_namespace(name)
        cable = ["name", INTERFACE, "netns", name, "type", "veth", "peer", "name", port]
        _run("ip", "link", "add", *cable, "netns", self._switch)
        _run("ip", "-n", self._switch, "link", "set", port, "master", "switch", "up")
        _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _run("ip", "-n", name, "link", "set", interface, "up")
        pid = self._stack.enter_context(_namespaces(name, self._folder / name, has_own_processes))
        return NetworkNode(name=name, address=address, pid=pid)

    def _make_namespace(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._stack.callback(_run, "ip", "netns", "delete", name)


@contextlib.contextmanager
def _namespaces(name: str, temporary: Path, has_own_processes: bool) -> Iterator[int]:
    """Start a process that keeps the namespaces alive; with `has_own_processes` it is their process 1."""
    temporary.mkdir()
    process_namespace = "--pid --mount-proc" if has_own_processes else ""
    # bash reaps orphans, which would look alive otherwise.
    rest = "sleep infinity & wait" if has_own_processes else "exec sleep infinity"
    inside = f"mount --bind {temporary} /tmp/ray && touch {temporary}/ready && {rest}"
    command = f"ip netns exec {name} unshare --mount {process_namespace} --fork --kill-child bash -c"
    # unshare prints an error message when its child is killed.
    with subprocess.Popen([*command.split(), inside], stderr=subprocess.DEVNULL) as outer:
        try:
            while not (temporary / "ready").exists():
                assert outer.poll() is None, f"no namespaces for {name}"
                time.sleep(0.02)
            yield int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
        finally:
            outer.kill()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
