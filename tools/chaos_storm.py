"""A run on a cluster, what can be done to it on purpose, and how long it takes to go on."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from chaos_cluster import ChaosCluster, NetworkCluster, ProcessCluster, worker_processes

from distft.errors import Preempted
from distft.tracker import EVENTS_FILE, METRICS_FILE, read_lines

_DRIVER = Path(__file__).with_name("chaos_driver.py")
_DONE_WITHIN_S = 240.0
_TELLS = {True: {"fault", "hang", "restart"}, False: {"straggler"}}  # events that name it, by `ends_ranks`


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """From a fault to the next optimizer step, in seconds since the fault."""

    kind: str
    step: int  # the last that was told before
    told_s: float | None  # an event names it; None where nothing outlives it that could tell
    resumed_s: float | None  # None where the ranks go on
    next_step_s: float
    world_size: int


Undo = Callable[[], None]  # called once the run has told of the fault


class Storm:
    """One run of the configuration `folder`/chaos.yaml, and what is done to it."""

    def __init__(
        self, make_cluster: Callable[[], ChaosCluster], folder: Path, environ: dict[str, str], restarts: str
    ) -> None:
        self.run_dir = folder / "run"
        self.brake = folder / "brake"  # while this file is there, steps take seconds
        self.storage = folder / "storage"  # a file system of its own, where it can be
        self._folder = folder
        self._environ = environ
        self._restarts = restarts
        self._make_cluster = make_cluster
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Storm":
        self.log = self._stack.enter_context((self._folder / "run.log").open("ab"))
        self.cluster = self._stack.enter_context(self._make_cluster())
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.driver.kill()
        self.driver.wait()
        self._stack.close()

    def start(self) -> None:
        """A driver, that goes on with the run."""
        config = self._folder / "chaos.yaml"
        run = [str(_DRIVER), str(self.brake), self._restarts, str(config), f"run_dir={self.run_dir}"]
        settings = [f"cluster.{key}={value}" for key, value in self.cluster.settings.items()]
        self.driver = subprocess.Popen(
            [*self.cluster.driver_prefix, sys.executable, *run, *settings],
            env={**self._environ, "RAY_ADDRESS": self.cluster.address},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def replace_cluster(self) -> None:
        self.cluster = self._stack.enter_context(self._make_cluster())

    def last_step(self) -> int:
        return max((int(line["step"]) for line in read_lines(self.run_dir / METRICS_FILE)), default=0)

    def wait_for_step(self, step: int) -> None:
        """Until the run has done `step`; the driver must live."""
        deadline = time.monotonic() + _DONE_WITHIN_S
        while self.last_step() < step:
            if self.driver.poll() is not None:
                raise SystemExit(f"The driver ended with {self.driver.returncode}; see {self.log.name}.")
            if time.monotonic() > deadline:
                raise SystemExit(f"Step {step} was not reached within {_DONE_WITHIN_S:g} s.")
            time.sleep(0.1)

    def strike(self, kind: str, choice: random.Random) -> Recovery:
        """Do it, and wait for the first optimizer step after it; where it ends ranks, of their next life."""
        step, began, fault = self.last_step(), time.time(), FAULTS[kind]
        tells, undo = _TELLS[fault.ends_ranks], fault.act(self, choice)
        deadline = time.monotonic() + _DONE_WITHIN_S
        while time.monotonic() < deadline:
            events = read_lines(self.run_dir / EVENTS_FILE)
            told = [e["time"] - began for e in events if e["kind"] in tells and e["time"] > began]
            if undo is not None and told:
                undo()
                undo = None
            found = self._recovery(kind, step, began, events)
            if found is not None and undo is None:
                return found
            if self.driver.poll() not in {None, 0}:
                raise SystemExit(f"The driver ended with {self.driver.returncode} after {kind}.")
            time.sleep(0.1)
        raise SystemExit(f"No step within {_DONE_WITHIN_S:g} s of {kind}.")

    def _recovery(self, kind: str, step: int, began: float, events: list[dict[str, Any]]) -> Recovery | None:
        tells = _TELLS[FAULTS[kind].ends_ranks]
        starts = [e for e in events if e["kind"] in {"resume", "start"}]
        told = [e["time"] for e in events if e["kind"] in tells and e["time"] > began]
        after = starts[-1]["time"] if FAULTS[kind].ends_ranks else (told or [float("inf")])[0]
        steps = [
            line["time"]
            for line in read_lines(self.run_dir / METRICS_FILE)
            if line["time"] > after > began and "loss" in line
        ]
        if not steps:
            return None
        return Recovery(
            kind=kind,
            step=step,
            told_s=round(told[0] - began, 1) if told and told[0] <= after else None,
            resumed_s=round(after - began, 1) if FAULTS[kind].ends_ranks else None,
            next_step_s=round(steps[0] - began, 1),
            world_size=int(starts[-1]["world_size"]),
        )

    def finish(self) -> None:
        """Wait for the end of the run."""
        code = self.driver.wait(timeout=_DONE_WITHIN_S)
        if code:
            raise SystemExit(f"The run ended with {code}; see {self.log.name}.")


def _kill_rank(_: Storm, choice: random.Random) -> None:
    choice.choice(worker_processes()).send_signal(signal.SIGKILL)


def _stop_rank(_: Storm, choice: random.Random) -> None:
    choice.choice(worker_processes()).send_signal(signal.SIGSTOP)


def _slow_rank(_: Storm, choice: random.Random) -> Undo:
    """It works for a tenth of each quarter of a second."""
    rank, is_over = choice.choice(worker_processes()), threading.Event()

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


def _kill_node(storm: Storm, choice: random.Random) -> None:
    storm.cluster.kill_node(choice)
    storm.cluster.add_node()


def _lose_node(storm: Storm, choice: random.Random) -> None:
    storm.cluster.kill_node(choice)


def _add_nodes(storm: Storm, _: random.Random) -> Undo:
    storm.brake.touch()
    storm.cluster.add_node()
    storm.cluster.add_node()
    return storm.brake.unlink


def _kill_raylet(storm: Storm, choice: random.Random) -> None:
    storm.cluster.kill_raylet(choice)
    storm.cluster.add_node()


def _drain_node(storm: Storm, choice: random.Random) -> Undo:
    """Half a minute's notice; the node goes as soon as the run has left it."""
    assert isinstance(storm.cluster, ProcessCluster)
    cluster = storm.cluster
    node = cluster.with_a_rank(choice)
    cluster.add_node()
    cluster.announce_end(node, notice_s=30)
    return lambda: cluster.forget(node)


def _cut_node_off(storm: Storm, choice: random.Random) -> Undo:
    assert isinstance(storm.cluster, NetworkCluster)
    cluster, node = storm.cluster, storm.cluster.cut_off(choice)
    storm.cluster.add_node()
    return lambda: cluster.plug_in(node)


def _kill_driver(storm: Storm, _: random.Random) -> None:
    storm.driver.kill()
    storm.driver.wait()
    storm.start()


def _terminate_driver(storm: Storm, _: random.Random) -> None:
    storm.driver.terminate()
    code = storm.driver.wait(timeout=60)
    if code != Preempted.exit_code:
        raise SystemExit(f"After SIGTERM the driver ended with {code}, not {Preempted.exit_code}.")
    storm.start()


def _kill_head(storm: Storm, _: random.Random) -> None:
    assert isinstance(storm.cluster, ProcessCluster)
    storm.cluster.kill_head()
    code = storm.driver.wait(timeout=120)
    if code != 1:
        raise SystemExit(f"Without its cluster the driver ended with {code}, not 1.")
    storm.replace_cluster()
    storm.start()


def _damage_commit(storm: Storm, choice: random.Random) -> None:
    """A byte of the newest commit, then a rank: the commit before must serve."""
    commits = sorted((storm.storage / "checkpoints").glob("step_*/manifest.json"))
    path = commits[-1].parent / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    _kill_rank(storm, choice)


def _fail_storage(storm: Storm, _: random.Random) -> Undo:
    """What is shared is not there for a while."""
    place, away = storm.storage / "checkpoints", storm.storage / "away"
    place.rename(away)
    place.touch()

    def come_back() -> None:
        place.unlink()
        away.rename(place)

    return come_back


def _fill_disk(storm: Storm, _: random.Random) -> Undo:
    ballast = storm.storage / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    return ballast.unlink


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something to do to a run."""

    act: Callable[[Storm, random.Random], Undo | None]
    ends_ranks: bool = True
    needs: Literal["", "no addresses", "addresses", "disk"] = ""  # of the cluster, or of this machine
    is_lasting: bool = False  # the number of nodes does not come back to what it was


FAULTS = {
    "rank killed": Fault(act=_kill_rank),
    "rank stopped": Fault(act=_stop_rank),
    "rank slow": Fault(act=_slow_rank, ends_ranks=False),
    "node killed": Fault(act=_kill_node),
    "raylet killed": Fault(act=_kill_raylet),
    "node drained": Fault(act=_drain_node, needs="no addresses"),
    "node cut off": Fault(act=_cut_node_off, needs="addresses"),
    "driver killed": Fault(act=_kill_driver),
    "driver terminated": Fault(act=_terminate_driver),
    "head killed": Fault(act=_kill_head, needs="no addresses"),
    "commit damaged": Fault(act=_damage_commit),
    "storage gone": Fault(act=_fail_storage),
    "disk full": Fault(act=_fill_disk, needs="disk"),
    "node lost": Fault(act=_lose_node, is_lasting=True),
    "two nodes join": Fault(act=_add_nodes, is_lasting=True),
}


@contextlib.contextmanager
def small_disk(place: Path) -> Any:
    """`place` as a file system of 128 MB, where this process may make one; says whether it is."""
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=128m", "tmpfs", str(place)]
    is_own = (
        os.geteuid() == 0
        and not subprocess.run(["mount", *options], capture_output=True, check=False).returncode
    )
    try:
        yield is_own
    finally:
        if is_own:
            subprocess.run(["umount", "--lazy", str(place)], check=True)
