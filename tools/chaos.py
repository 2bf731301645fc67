"""Injects faults into a run on a Ray cluster: `python tools/chaos.py --seed 1 --faults 6`.

Trains a small model on a Ray cluster of several nodes on this machine. Meanwhile it kills, stops, slows and
disconnects ranks, nodes, raylets, drivers and the head, damages checkpoints, and makes storage fail, in a
seeded order. Exits with 0 if every loss equals that of an undisturbed run, and `distft audit` finds every
sequence used exactly once.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import network_nodes
import yaml
from chaos_cluster import ChaosCluster, NetworkCluster, ProcessCluster
from chaos_run import FAULTS, FaultInjectionRun, small_disk

from distft.cluster.tokens import ensure_token
from distft.prepare import TokenizeConfig, tokenize
from distft.run.audit import audit_run
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer
from distft.tracker import METRICS_FILE, read_lines

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-4  # of a loss: sums over another number of ranks round differently, and training amplifies it


def make_config(folder: Path, num_steps: int, max_workers: int) -> Path:
    """Tokenize this project's source, and configure a model that takes some tenths of a second per step."""
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
        # A rate of 0.001 amplifies rounding 30 times as much: two ranks differ from one by up to 2e-4.
        "optim": {"peak_lr": 0.0003, "schedule": {"type": "cosine", "warmup_steps": 10}},
        "train": {"max_steps": num_steps, "log_every_steps": 1},
        "checkpoint": {
            "directory": str(folder / "storage/checkpoints"),
            "every_steps": 10,
            "keep_last": 3,
        },
        "hang_timeout_s": 10.0,
        "heartbeat_s": 1.0,
        "cluster": {"workers": {"min": 1, "max": max_workers}, "grow_check_s": 3.0},
    }
    path = folder / "chaos.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def train_undisturbed(config: Path, run_dir: Path) -> dict[int, float]:
    """Train in one process, without Ray or DeepSpeed; returns the loss of each step."""
    command = [sys.executable, "-m", "distft", "train", str(config), f"run_dir={run_dir}"]
    alone = ["engine={type: local}", "checkpoint.directory=null"]
    subprocess.run([*command, *alone], check=True, capture_output=True, cwd=ROOT)
    return losses(run_dir)


def losses(run_dir: Path) -> dict[int, float]:
    return {int(line["step"]): line["loss"] for line in read_lines(run_dir / METRICS_FILE) if "loss" in line}


def schedule(kinds: Sequence[str], num_faults: int, rng: random.Random) -> list[str]:
    """`num_faults` kinds: each once in a random order, then each again, and so on."""
    planned: list[str] = []
    while len(planned) < num_faults:
        planned += rng.sample(list(kinds), len(kinds))
    return planned[:num_faults]


def is_possible(kind: str, *, has_addresses: bool, has_disk: bool) -> bool:
    """Whether this kind of fault can be injected into this cluster, on this machine."""
    needed = {"addresses": has_addresses, "no addresses": not has_addresses, "disk": has_disk}
    return needed.get(FAULTS[kind].needs, True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the order of faults, and of what they hit")
    parser.add_argument("--faults", type=int, help="number of faults; default: one of each kind")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(FAULTS), help="default: all that are possible here"
    )
    parser.add_argument(
        "--in-order", action="store_true", help="inject the kinds in the order given, each once"
    )
    parser.add_argument(
        "--network", action="store_true", help="give each node an address of its own; needs root"
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--max-workers", type=int, help="default: the number of nodes")
    parser.add_argument("--steps-between", type=int, default=15)
    parser.add_argument("--ray-defaults", action="store_true", help="leave restarts to Ray Train, to compare")
    parser.add_argument("--directory", type=Path, help="for all files; default: a temporary one")
    arguments = parser.parse_args()
    if arguments.network and (reason := network_nodes.why_unavailable()):
        raise SystemExit(f"--network {reason}.")
    with tempfile.TemporaryDirectory(prefix="chaos_") as name:
        return inject_faults(arguments, arguments.directory or Path(name))


def inject_faults(arguments: argparse.Namespace, folder: Path) -> int:
    """Run the whole experiment below `folder`, and print a table row per fault; returns the exit code."""
    with small_disk(folder / "storage") as has_disk:
        is_possible_here = partial(is_possible, has_addresses=arguments.network, has_disk=has_disk)
        kinds = arguments.kinds or [
            kind for kind, fault in FAULTS.items() if is_possible_here(kind) and not fault.changes_num_nodes
        ]
        if impossible := [kind for kind in kinds if not is_possible_here(kind)]:
            raise SystemExit(f"Not possible with this cluster on this machine: {', '.join(impossible)}.")
        rng = random.Random(arguments.seed)
        print(f"--seed {arguments.seed}", flush=True)
        planned = kinds if arguments.in_order else schedule(kinds, arguments.faults or len(kinds), rng)
        num_steps = arguments.steps_between * (len(planned) + 2)
        config = make_config(folder, num_steps, arguments.max_workers or arguments.nodes)
        expected = train_undisturbed(config, folder / "undisturbed")
        environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if arguments.network:
            environ |= {"RAY_AUTH_TOKEN_PATH": str(folder / "token")}
            ensure_token(environ)

        def make_cluster() -> ChaosCluster:
            return (
                NetworkCluster(arguments.nodes, folder, environ)
                if arguments.network
                else ProcessCluster(arguments.nodes)
            )

        restarts = "ray" if arguments.ray_defaults else "distft"
        with FaultInjectionRun(make_cluster, folder, environ, restarts) as run:
            print("| fault | at step | reported, s | resumed, s | next step, s | ranks |")
            print("|---|---:|---:|---:|---:|---:|", flush=True)
            for number, kind in enumerate(planned):
                run.wait_for_step((number + 1) * arguments.steps_between)
                row = asdict(run.inject(kind, rng))
                cells = ("-" if value is None else str(value) for value in row.values())
                print(f"| {' | '.join(cells)} |", flush=True)
            run.wait_for_end()
        return compare(expected, folder / "run")


def compare(expected: dict[int, float], run_dir: Path) -> int:
    """Compare losses and audit the run; returns 0 if both are as without faults."""
    found = losses(run_dir)
    gaps = {step: abs(found.get(step, float("inf")) - loss) for step, loss in expected.items()}
    worst = max(gaps, key=gaps.__getitem__)
    audit, _ = audit_run(str(run_dir))
    is_same = gaps[worst] <= TOLERANCE
    print(
        f"{len(found)} of {len(expected)} steps; the largest difference of a loss is {gaps[worst]:.2g}, "
        f"at step {worst}; {audit.num_lost_steps} steps were repeated; ranks {list(audit.world_sizes)}; "
        f"every sequence {'was' if audit.is_exact else 'WAS NOT'} used exactly once"
    )
    print(json.dumps({"largest_difference": gaps[worst], **asdict(audit)}))
    return 0 if is_same and audit.is_exact else 1


if __name__ == "__main__":
    sys.exit(main())
