"""A run on a cluster, the faults that can be injected into it, and how long it takes to recover."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from chaos_cluster import ChaosCluster, NetworkCluster, ProcessCluster, worker_processes

from distft.errors import Preempted
from distft.tracker import EVENTS_FILE, METRICS_FILE, read_lines

_DRIVER = Path(__file__).with_name("chaos_driver.py")
_TIMEOUT_S = 240.0
_REPORTS = {True: {"fault", "hang", "restart"}, False: {"straggler"}}  # kinds of event, by `ends_ranks`


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """How a run recovered from a fault. Times are in seconds since the fault."""

    kind: str
    step: int  # the last one logged before
    reported_s: float | None  # an event names the fault; None if no process survives that could log one
    resumed_s: float | None  # new ranks start; None if the old ones go on
    next_step_s: float  # the next optimizer step is logged
    world_size: int


Undo = Callable[[], None]  # called once the run has reported the fault


class FaultInjectionRun:
    """A context: a run of the configuration `folder`/chaos.yaml on its cluster, for injecting faults."""

    def __init__(
        self, make_cluster: Callable[[], ChaosCluster], folder: Path, environ: dict[str, str], restarts: str
    ) -> None:
        self.run_dir = folder / "run"
        self.brake = folder / "brake"  # while this file exists, steps take seconds
        self.storage = folder / "storage"  # a file system of its own, if possible
        self._folder = folder
        self._environ = environ
        self._restarts = restarts
        self._make_cluster = make_cluster
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "FaultInjectionRun":
        self.log = self._stack.enter_context((self._folder / "run.log").open("ab"))
        self.cluster = self._stack.enter_context(self._make_cluster())
        self.start_driver()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.driver.kill()
        self.driver.wait()
        self._stack.close()

    def start_driver(self) -> None:
        """Start a driver, which resumes the run."""
        config = self._folder / "chaos.yaml"
        arguments = [str(_DRIVER), str(self.brake), self._restarts, str(config), f"run_dir={self.run_dir}"]
        settings = [f"cluster.{key}={value}" for key, value in self.cluster.settings.items()]
        self.driver = subprocess.Popen(
            [*self.cluster.driver_prefix, sys.executable, *arguments, *settings],
            env={**self._environ, "RAY_ADDRESS": self.cluster.address},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def replace_cluster(self) -> None:
        self.cluster = self._stack.enter_context(self._make_cluster())

    def last_step(self) -> int:
        return max((int(line["step"]) for line in read_lines(self.run_dir / METRICS_FILE)), default=0)

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has logged `step`. Raises `SystemExit` if the driver ends before."""
        deadline = time.monotonic() + _TIMEOUT_S
        while self.last_step() < step:
            if self.driver.poll() is not None:
                raise SystemExit(f"The driver ended with {self.driver.returncode}; see {self.log.name}.")
            if time.monotonic() > deadline:
                raise SystemExit(f"Step {step} was not reached within {_TIMEOUT_S:g} s.")
            time.sleep(0.1)

    def inject(self, kind: str, rng: random.Random) -> Recovery:
        """Inject a fault, and wait for the next optimizer step: of new ranks, if the fault ends them."""
        step, injected, fault = self.last_step(), time.time(), FAULTS[kind]
        undo = fault.inject(self, rng)
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            events = read_lines(self.run_dir / EVENTS_FILE)
            if undo is not None and _report_times(kind, injected, events):
                undo()
                undo = None
            found = self._recovery(kind, step, injected, events)
            if found is not None and undo is None:
                return found
            if self.driver.poll() not in {None, 0}:
                raise SystemExit(f"The driver ended with {self.driver.returncode} after {kind}.")
            time.sleep(0.1)
        raise SystemExit(f"No step within {_TIMEOUT_S:g} s of {kind}.")

    def _recovery(
        self, kind: str, step: int, injected: float, events: list[dict[str, Any]]
    ) -> Recovery | None:
        """How the run recovered; None as long as it has not."""
        starts = [e for e in events if e["kind"] in {"resume", "start"}]
        reports = _report_times(kind, injected, events)
        after = starts[-1]["time"] if FAULTS[kind].ends_ranks else (reports or [float("inf")])[0]
        steps = [
            line["time"]
            for line in read_lines(self.run_dir / METRICS_FILE)
            if line["time"] > after > injected and "loss" in line
        ]
        if not steps:
            return None
        return Recovery(
            kind=kind,
            step=step,
            reported_s=round(reports[0] - injected, 1) if reports and reports[0] <= after else None,
            resumed_s=round(after - injected, 1) if FAULTS[kind].ends_ranks else None,
            next_step_s=round(steps[0] - injected, 1),
            world_size=int(starts[-1]["world_size"]),
        )

    def wait_for_end(self) -> None:
        """Wait until the run has ended. Raises `SystemExit` if it failed."""
        code = self.driver.wait(timeout=_TIMEOUT_S)
        if code:
            raise SystemExit(f"The run ended with {code}; see {self.log.name}.")


def _report_times(kind: str, injected: float, events: list[dict[str, Any]]) -> list[float]:
    """When the run logged events that may name a fault of this kind since it was injected."""
    kinds = _REPORTS[FAULTS[kind].ends_ranks]
    return [e["time"] for e in events if e["kind"] in kinds and e["time"] > injected]


def _kill_rank(_: FaultInjectionRun, rng: random.Random) -> None:
    rng.choice(worker_processes()).send_signal(signal.SIGKILL)


def _stop_rank(_: FaultInjectionRun, rng: random.Random) -> None:
    rng.choice(worker_processes()).send_signal(signal.SIGSTOP)


def _slow_rank(_: FaultInjectionRun, rng: random.Random) -> Undo:
    """Let a rank work only for 0.1 s of each 0.25 s."""
    rank, is_over = rng.choice(worker_processes()), threading.Event()

    def alternate() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not is_over.is_set():
                rank.send_signal(signal.SIGSTOP)
                time.sleep(0.15)
                rank.send_signal(signal.SIGCONT)
                time.sleep(0.1)

    thread = threading.Thread(target=alternate, daemon=True)
    thread.start()

    def end() -> None:
        is_over.set()
        thread.join()

    return end


def _kill_node(run: FaultInjectionRun, rng: random.Random) -> None:
    run.cluster.kill_node(rng)
    run.cluster.add_node()


def _lose_node(run: FaultInjectionRun, rng: random.Random) -> None:
    run.cluster.kill_node(rng)


def _add_nodes(run: FaultInjectionRun, _: random.Random) -> Undo:
    run.brake.touch()
    run.cluster.add_node()
    run.cluster.add_node()
    return run.brake.unlink


def _kill_raylet(run: FaultInjectionRun, rng: random.Random) -> None:
    run.cluster.kill_raylet(rng)
    run.cluster.add_node()


def _drain_node(run: FaultInjectionRun, rng: random.Random) -> Undo:
    """Announce 30 s before that a node will leave; drop it once the run has left it."""
    assert isinstance(run.cluster, ProcessCluster)
    cluster = run.cluster
    node = cluster.choose_node(rng)
    cluster.add_node()
    cluster.announce_removal(node, notice_s=30)
    return lambda: cluster.forget(node)


def _disconnect_node(run: FaultInjectionRun, rng: random.Random) -> Undo:
    assert isinstance(run.cluster, NetworkCluster)
    cluster, node = run.cluster, run.cluster.disconnect(rng)
    run.cluster.add_node()
    return lambda: cluster.reconnect(node)


def _kill_driver(run: FaultInjectionRun, _: random.Random) -> None:
    run.driver.kill()
    run.driver.wait()
    run.start_driver()


def _terminate_driver(run: FaultInjectionRun, _: random.Random) -> None:
    run.driver.terminate()
    code = run.driver.wait(timeout=60)
    if code != Preempted.exit_code:
        raise SystemExit(f"After SIGTERM the driver ended with {code}, not {Preempted.exit_code}.")
    run.start_driver()


def _kill_head(run: FaultInjectionRun, _: random.Random) -> None:
    assert isinstance(run.cluster, ProcessCluster)
    run.cluster.kill_head()
    code = run.driver.wait(timeout=120)
    if code != 1:
        raise SystemExit(f"Without its cluster the driver ended with {code}, not 1.")
    run.replace_cluster()
    run.start_driver()


def _damage_commit(run: FaultInjectionRun, rng: random.Random) -> None:
    """Damage a byte of the newest checkpoint and kill a rank: the run must resume from the one before."""
    commits = sorted((run.storage / "checkpoints").glob("step_*/manifest.json"))
    path = min(commits[-1].parent.glob("rank_00000*.safetensors"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    _kill_rank(run, rng)


def _fail_storage(run: FaultInjectionRun, _: random.Random) -> Undo:
    """Replace the checkpoint directory by a file for a while."""
    directory, moved = run.storage / "checkpoints", run.storage / "away"
    directory.rename(moved)
    directory.touch()

    def restore() -> None:
        directory.unlink()
        moved.rename(directory)

    return restore


def _fill_disk(run: FaultInjectionRun, _: random.Random) -> Undo:
    ballast = run.storage / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    return ballast.unlink


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """A kind of fault to inject."""

    inject: Callable[[FaultInjectionRun, random.Random], Undo | None]
    ends_ranks: bool = True  # else the same ranks go on
    needs: Literal["", "no addresses", "addresses", "disk"] = ""  # from the cluster, or from this machine
    changes_num_nodes: bool = False  # for the rest of the run


FAULTS = {
    "rank killed": Fault(inject=_kill_rank),
    "rank stopped": Fault(inject=_stop_rank),
    "rank slow": Fault(inject=_slow_rank, ends_ranks=False),
    "node killed": Fault(inject=_kill_node),
    "raylet killed": Fault(inject=_kill_raylet),
    "node drained": Fault(inject=_drain_node, needs="no addresses"),
    "node cut off": Fault(inject=_disconnect_node, needs="addresses"),
    "driver killed": Fault(inject=_kill_driver),
    "driver terminated": Fault(inject=_terminate_driver),
    "head killed": Fault(inject=_kill_head, needs="no addresses"),
    "commit damaged": Fault(inject=_damage_commit),
    "storage gone": Fault(inject=_fail_storage),
    "disk full": Fault(inject=_fill_disk, needs="disk"),
    "node lost": Fault(inject=_lose_node, changes_num_nodes=True),
    "two nodes join": Fault(inject=_add_nodes, changes_num_nodes=True),
}


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """Mount a file system of 128 MB at `directory` if this process may; the value says whether it did."""
    directory.mkdir()
    options = ["-t", "tmpfs", "-o", "size=128m", "tmpfs", str(directory)]
    is_mounted = (
        os.geteuid() == 0
        and not subprocess.run(["mount", *options], capture_output=True, check=False).returncode
    )
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)
