"""Two machines on this one: namespaces for network, processes and mounts, joined by a cable. Needs root."""

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

INTERFACE = "eth0"
_TOOLS = ("ip", "unshare", "nsenter", "mount")


def lacking() -> str:
    """Why there can be no such nodes here; empty where there can."""
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    name = f"distft_{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this machine makes no network namespaces"
    _run("ip", "netns", "delete", name)
    return ""


@contextlib.contextmanager
def two_nodes(folder: Path) -> Iterator[dict[str, int]]:
    """From the nodes' names to the process ids of what lives in them. What runs there ends with the block.

    Each has an address of 10.231.7.0/24 on `INTERFACE`, and a /tmp/ray of its own below `folder`.
    """
    Path("/tmp/ray").mkdir(exist_ok=True)
    names = [f"distft_{secrets.token_hex(3)}_{index}" for index in (1, 2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "delete", name)
        cable = [["name", INTERFACE, "netns", name] for name in names]
        _run("ip", "link", "add", *cable[0], "type", "veth", "peer", *cable[1])
        for index, name in enumerate(names, start=1):
            _run("ip", "-n", name, "address", "add", f"10.231.7.{index}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _run("ip", "-n", name, "link", "set", interface, "up")
        yield {name: stack.enter_context(_living(name, folder / name)) for name in names}


@contextlib.contextmanager
def _living(name: str, temporary: Path) -> Iterator[int]:
    """A process that is the first of its namespace: when it dies, all others there do."""
    temporary.mkdir()
    # Orphans are bash's to reap, or they would look alive for ever.
    inside = f"mount --bind {temporary} /tmp/ray && touch {temporary}/ready && sleep infinity & wait"
    command = f"ip netns exec {name} unshare --pid --mount --fork --kill-child --mount-proc bash -c"
    with subprocess.Popen([*command.split(), inside]) as outer:
        try:
            while not (temporary / "ready").exists():
                assert outer.poll() is None, f"no namespaces for {name}"
                time.sleep(0.02)
            yield int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
        finally:
            outer.kill()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
