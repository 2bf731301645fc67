"""Faults on purpose: `python tools/chaos.py --seed 1 --faults 6`.

Trains a small model on a Ray cluster of several nodes on this machine while ranks, nodes, raylets and drivers
are killed, stopped and commits damaged, at seeded moments. At the end every loss must equal that of a run
that nobody disturbed, and `distft audit` must find every sequence used exactly once. Exit code 0 if so.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from chaos_cluster import ProcessCluster, worker_processes

from distft.errors import Preempted
from distft.prepare import TokenizeConfig, tokenize
from distft.run.audit import audit_run
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer
from distft.tracker import EVENTS_FILE, METRICS_FILE, read_lines

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4  # of a loss: sums over other numbers of ranks round differently, and training carries it on
_DONE_WITHIN_S = 240.0
RAY_TRAINS_OWN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """From a fault to the next optimizer step, in seconds since the fault."""

    kind: str
    step: int  # the last that was told before
    told_s: float | None  # an event names it; None where nothing outlives it that could tell
    resumed_s: float
    next_step_s: float
    world_size: int


class Storm:
    """One run of the configuration on `cluster`, and what is done to it."""

    def __init__(self, cluster: ProcessCluster, config: Path, run_dir: Path, environ: dict[str, str]) -> None:
        self._cluster = cluster
        self._command = [sys.executable, str(ROOT / "launch/ray_train.py"), str(config), f"run_dir={run_dir}"]
        self._environ = environ
        self.run_dir = run_dir
        self.log = run_dir.with_suffix(".log").open("ab")
        self.driver = self._start()

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self._command, env=self._environ, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT
        )

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
        """Do it, and wait for the first optimizer step of the life after it."""
        step, began = self.last_step(), time.time()
        (FAULTS | CHANGES)[kind](self, choice)
        deadline = time.monotonic() + _DONE_WITHIN_S
        while time.monotonic() < deadline:
            found = self._recovery(kind, step, began)
            if found is not None:
                return found
            if self.driver.poll() not in {None, 0}:
                raise SystemExit(f"The driver ended with {self.driver.returncode} after {kind}.")
            time.sleep(0.1)
        raise SystemExit(f"No step within {_DONE_WITHIN_S:g} s of {kind}.")

    def _recovery(self, kind: str, step: int, began: float) -> Recovery | None:
        events = [e for e in read_lines(self.run_dir / EVENTS_FILE) if e["time"] > began]
        resumes = [e for e in events if e["kind"] in {"resume", "start"}]
        if not resumes:
            return None
        resumed = resumes[-1]
        lines = read_lines(self.run_dir / METRICS_FILE)
        steps = [line["time"] for line in lines if line["time"] > resumed["time"] and "loss" in line]
        if not steps:
            return None
        told = [e["time"] for e in events if e["kind"] in {"fault", "hang"} and e["time"] <= resumed["time"]]
        return Recovery(
            kind=kind,
            step=step,
            told_s=round(told[0] - began, 1) if told else None,
            resumed_s=round(resumed["time"] - began, 1),
            next_step_s=round(steps[0] - began, 1),
            world_size=int(resumed["world_size"]),
        )

    def kill_rank(self, choice: random.Random) -> None:
        choice.choice(worker_processes()).send_signal(signal.SIGKILL)

    def stop_rank(self, choice: random.Random) -> None:
        choice.choice(worker_processes()).send_signal(signal.SIGSTOP)

    def kill_node(self, choice: random.Random) -> None:
        self._cluster.kill_node(choice)
        self._cluster.add_node()

    def lose_node(self, choice: random.Random) -> None:
        """No other comes in its place."""
        self._cluster.kill_node(choice)

    def add_nodes(self, _: random.Random) -> None:
        self._cluster.add_node()
        self._cluster.add_node()

    def kill_raylet(self, choice: random.Random) -> None:
        self._cluster.kill_raylet(choice)
        self._cluster.add_node()

    def kill_driver(self, _: random.Random) -> None:
        self.driver.kill()
        self.driver.wait()
        self.driver = self._start()

    def terminate_driver(self, _: random.Random) -> None:
        self.driver.terminate()
        code = self.driver.wait(timeout=60)
        if code != Preempted.exit_code:
            raise SystemExit(f"After SIGTERM the driver ended with {code}, not {Preempted.exit_code}.")
        self.driver = self._start()

    def damage(self, choice: random.Random) -> None:
        """A byte of the newest commit, then a rank: the commit before must serve."""
        commits = sorted((self.run_dir / "checkpoints").glob("step_*/manifest.json"))
        path = commits[-1].parent / "rank_00000.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        self.kill_rank(choice)

    def finish(self) -> None:
        """Wait for the end of the run."""
        code = self.driver.wait(timeout=_DONE_WITHIN_S)
        if code:
            raise SystemExit(f"The run ended with {code}; see {self.log.name}.")


Act = Callable[[Storm, random.Random], None]
FAULTS: dict[str, Act] = {
    "rank killed": Storm.kill_rank,
    "rank stopped": Storm.stop_rank,
    "node killed": Storm.kill_node,
    "raylet killed": Storm.kill_raylet,
    "driver killed": Storm.kill_driver,
    "driver terminated": Storm.terminate_driver,
    "commit damaged": Storm.damage,
}
# For runs whose number of nodes is not to come back to what it was: `--kinds`, and `--in-order`.
CHANGES: dict[str, Act] = {"node lost": Storm.lose_node, "two nodes join": Storm.add_nodes}


def make_config(folder: Path, num_steps: int, max_workers: int) -> Path:
    """Shards of this project's own source, and a model that takes some tenths of a second a step."""
    sources = sorted(path for path in (ROOT / "distft").rglob("*.py") if path.stat().st_size)
    model = folder / "bpe.model"
    train_tokenizer((path.read_text() for path in sources), TokenizerTrainConfig(vocab_size=1024), model)
    corpus = {"type": "text", "paths": [str(path) for path in sources]}
    shards = folder / "shards"
    work = {"corpus": corpus, "tokenizer": str(model), "output": str(shards)}
    tokenize(TokenizeConfig.model_validate(work))
    raw: dict[str, Any] = {
        "run_dir": str(folder / "unused"),
        "device": "cpu",
        "timeout_s": 60.0,
        "model": {"max_seq_len": 128, "d_model": 128, "num_layers": 4, "num_heads": 4},
        "data": {"type": "tokens", "sources": [{"path": str(shards / "train")}]},
        "engine": {"type": "zero", "zero_stage": 1},
        "batch": {"global_batch_size": 12, "micro_batch_size": 4, "seq_len": 128},
        "optim": {"peak_lr": 0.001, "schedule": {"type": "cosine", "warmup_steps": 10}},
        "train": {"max_steps": num_steps, "log_every_steps": 1},
        "checkpoint": {"every_steps": 10, "keep_last": 3},
        "hang_timeout_s": 10.0,
        "heartbeat_s": 1.0,
        "cluster": {"workers": {"min": 1, "max": max_workers}, "grow_check_s": 3.0},
    }
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def undisturbed(config: Path, run_dir: Path) -> dict[int, float]:
    """Losses of one process, without Ray or DeepSpeed."""
    command = [sys.executable, "-m", "distft", "train", str(config), f"run_dir={run_dir}"]
    subprocess.run([*command, "engine={type: local}"], check=True, capture_output=True, cwd=ROOT)
    return losses(run_dir)


def losses(run_dir: Path) -> dict[int, float]:
    return {int(line["step"]): line["loss"] for line in read_lines(run_dir / METRICS_FILE) if "loss" in line}


def schedule(kinds: Sequence[str], num_faults: int, choice: random.Random) -> list[str]:
    """Each kind once, in a seeded order, then again until there are enough."""
    planned: list[str] = []
    while len(planned) < num_faults:
        planned += choice.sample(list(kinds), len(kinds))
    return planned[:num_faults]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=len(FAULTS))
    parser.add_argument("--kinds", nargs="+", choices=[*FAULTS, *CHANGES], default=list(FAULTS))
    parser.add_argument("--in-order", action="store_true", help="the kinds as they are named")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--max-workers", type=int, help="as many as nodes unless given")
    parser.add_argument("--steps-between", type=int, default=15)
    parser.add_argument("--ray-defaults", action="store_true", help="Ray Train's own intervals, to compare")
    parser.add_argument("--directory", type=Path, help="where everything lies; removed unless given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos_") as name:
        return _storm(arguments, arguments.directory or Path(name))


def _storm(arguments: argparse.Namespace, folder: Path) -> int:
    choice = random.Random(arguments.seed)
    num_faults = len(arguments.kinds) if arguments.in_order else arguments.faults
    num_steps = arguments.steps_between * (num_faults + 2)
    config = make_config(folder, num_steps, arguments.max_workers or arguments.nodes)
    expected = undisturbed(config, folder / "undisturbed")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environ |= RAY_TRAINS_OWN if arguments.ray_defaults else {}
    with ProcessCluster(arguments.nodes) as cluster:
        storm = Storm(cluster, config, folder / "run", environ | {"RAY_ADDRESS": cluster.address})
        try:
            print("| fault | at step | told, s | resumed, s | next step, s | ranks |")
            print("|---|---:|---:|---:|---:|---:|")
            planned = arguments.kinds if arguments.in_order else None
            for number, kind in enumerate(planned or schedule(arguments.kinds, arguments.faults, choice)):
                storm.wait_for_step((number + 1) * arguments.steps_between)
                row = asdict(storm.strike(kind, choice))
                cells = ("-" if value is None else str(value) for value in row.values())
                print(f"| {' | '.join(cells)} |", flush=True)
            storm.finish()
        finally:
            storm.driver.kill()
            storm.log.close()
    return verdict(expected, storm.run_dir)


def verdict(expected: dict[int, float], run_dir: Path) -> int:
    """Compare losses and audit; 0 where nothing was lost."""
    found = losses(run_dir)
    gaps = {step: abs(found.get(step, float("inf")) - loss) for step, loss in expected.items()}
    worst = max(gaps, key=gaps.__getitem__)
    audit, _ = audit_run(str(run_dir))
    is_same = gaps[worst] <= TOLERANCE
    print(
        f"{len(found)} of {len(expected)} steps; the largest difference of a loss is {gaps[worst]:.2g}, "
        f"at step {worst}; {audit.num_lost_steps} steps were done again; ranks {list(audit.world_sizes)}; "
        f"every sequence {'was' if audit.is_exact else 'WAS NOT'} used exactly once"
    )
    print(json.dumps({"largest_difference": gaps[worst], **asdict(audit)}))
    return 0 if is_same and audit.is_exact else 1


if __name__ == "__main__":
    sys.exit(main())
