"""How long the command line takes to start: `python tools/benchmark.py start`.

Measures, in new processes, the time until a mistake in a configuration is told, and until a run has done its
first optimizer step. Run it on an idle machine; the best turn of each counts.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from distft.prepare import TokenizeConfig, tokenize
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer
from distft.tracker import METRICS_FILE

ROOT = Path(__file__).resolve().parents[1]
_POLL_S = 0.005
_TIMEOUT_S = 120.0
_ENGINES = {"local": "engine={type: local}", "ZeRO 1": "engine={type: zero, zero_stage: 1}"}


def prepare(folder: Path) -> Path:
    """Write a tokenizer, token shards and the configuration of a tiny run; returns the configuration."""
    sources = sorted(path for path in (ROOT / "distft").rglob("*.py") if path.stat().st_size)[:20]
    model = folder / "tokenizer.model"
    train_tokenizer((path.read_text() for path in sources), TokenizerTrainConfig(algorithm="char"), model)
    corpus = {"type": "text", "paths": [str(path) for path in sources]}
    work = {"corpus": corpus, "tokenizer": str(model), "output": str(folder / "shards"), "num_workers": 1}
    tokenize(TokenizeConfig.model_validate(work))
    raw: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"max_seq_len": 64, "d_model": 32, "num_layers": 2, "num_heads": 2},
        "data": {"type": "tokens", "sources": [{"path": str(folder / "shards" / "train")}]},
        "batch": {"global_batch_size": 4, "micro_batch_size": 2, "seq_len": 64},
        "optim": {"schedule": {"type": "cosine", "warmup_steps": 1}},
        "train": {"max_steps": 2, "log_every_steps": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def mistakes(config: Path) -> dict[str, list[str]]:
    """Commands with a mistake, by what is wrong."""
    nowhere = str(config.parent / "nowhere")
    mistaken = [str(config), "train.max_step=5"]
    return {
        "train, unknown key": ["train", *mistaken],
        "train, no such file": ["train", nowhere],
        "train, no such data": ["train", str(config), f"data.sources.0.path={nowhere}"],
        "train, no such tokenizer": ["train", str(config), f"tokenizer={nowhere}"],
        "train, no such checkpoint": ["train", str(config), f"init_from={nowhere}"],
        "config check, unknown key": ["config", "check", *mistaken],
        "config show, unknown key": ["config", "show", *mistaken],
        "submit, unknown key": ["submit", *mistaken],
        "evaluate, no such checkpoint": ["evaluate", nowhere],
        "generate, no such checkpoint": ["generate", nowhere],
        "checkpoint inspect, no such checkpoint": ["checkpoint", "inspect", nowhere],
        "tokenize, no such tokenizer": ["tokenize", str(config), "-t", nowhere, "-o", nowhere],
    }


def seconds_to_exit(arguments: Sequence[str]) -> float:
    """Wall time of a command that fails."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    seconds = time.perf_counter() - started
    if done.returncode != 2:
        raise SystemExit(f"{arguments} ended with {done.returncode}, not 2:\n{done.stderr}")
    return seconds


def seconds_to_first_step(arguments: Sequence[str], run_dir: Path) -> float:
    """From the start of the process until the first step's metrics are written."""
    command = [sys.executable, "-m", "distft", "train", *arguments, f"run_dir={run_dir}"]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        metrics = run_dir / METRICS_FILE
        while not (metrics.exists() and metrics.stat().st_size):
            if process.poll() not in {None, 0} or time.perf_counter() - started > _TIMEOUT_S:
                process.kill()
                raise SystemExit(f"{command} did no step:\n{process.communicate()[0].decode()}")
            time.sleep(_POLL_S)
        seconds = time.perf_counter() - started
        process.communicate()
    return seconds


def start(arguments: argparse.Namespace) -> None:
    """Measure, then print a table for docs/benchmarks.md."""
    with tempfile.TemporaryDirectory(prefix="start_") as name:
        folder = Path(name)
        config = prepare(folder)
        best: dict[str, float] = {}

        def record(what: str, seconds: float) -> None:
            best[what] = min(best.get(what, float("inf")), seconds)

        for turn in range(arguments.turns):
            record("--help", _seconds_of_help())
            for what, command in mistakes(config).items():
                record(what, seconds_to_exit(["distft", *command]))
            record(
                "driver on Ray, unknown key",
                seconds_to_exit(["distft.cli.ray_driver", str(config), "train.max_step=5"]),
            )
            for engine, override in _ENGINES.items():
                run_dir = folder / f"{engine} {turn}".replace(" ", "_")
                record(f"first step, {engine}", seconds_to_first_step([str(config), override], run_dir))
    print("| | seconds |\n|---|---:|")
    for what, seconds in best.items():
        print(f"| {what} | {seconds:.2f} |")


def _seconds_of_help() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "distft", "--help"], check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - started


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    start(parser.parse_args())
