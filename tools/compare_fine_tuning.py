"""Fine-tunes one task in several ways and prints what each costs and reaches.

    python tools/compare_fine_tuning.py configs/minilm_trec.yaml data/trec/test.jsonl --directory runs/methods

Each method is `CONFIG` with other settings. A method that has run is not run again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

HEAD = "classifier.*"
_GRADUAL = [  # the head first, then block after block from the top
    {"steps": 40, "trainable": [HEAD]},
    {"steps": 40, "trainable": [HEAD, "@last_blocks:2"]},
    {"steps": 40, "trainable": [HEAD, "@last_blocks:4"]},
    {"trainable": ["*", "!@embeddings"]},
]
_LISA = [
    {"trainable": ["*", "!@embeddings"], "random_blocks": {"num_blocks": 2, "every_steps": 40}},
]
METHODS: dict[str, list[str]] = {
    "full": ["trainable=['*']"],
    "all but embeddings": ["trainable=['*', '!@embeddings']"],
    "the last four blocks": [f"trainable=['@last_blocks:4', '{HEAD}']"],
    "the last two blocks": [f"trainable=['@last_blocks:2', '{HEAD}']"],
    "gradual": [f"phases={json.dumps(_GRADUAL)}"],
    "layer-wise rates": ["trainable=['*']", "optim.layer_decay=0.8"],
    "LISA, two blocks": [f"phases={json.dumps(_LISA)}"],
    "LoRA, rank 8": [f"trainable=['@lora', '{HEAD}']", "lora={rank: 8, alpha: 16}", "optim.peak_lr=1e-3"],
    "DoRA, rank 8": [
        f"trainable=['@lora', '{HEAD}']",
        "lora={rank: 8, alpha: 16, dora: true}",
        "optim.peak_lr=1e-3",
    ],
    "biases (BitFit)": [f"trainable=['@biases', '{HEAD}']", "optim.peak_lr=2e-3"],
    "the head alone": [f"trainable=['{HEAD}']", "optim.peak_lr=2e-3"],
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one method reached with each seed, and what it cost."""

    method: str
    accuracies: Sequence[float]
    num_trainable: int
    optimizer_bytes: int
    step_s: float  # the fastest of the logged means: other load on the machine only adds
    checkpoint_bytes: int
    peak_memory_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("test", help="labelled rows, for the accuracy alone")
    parser.add_argument("--directory", type=Path, required=True, help="of the runs")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all methods")
    arguments = parser.parse_args()
    results = [_result(arguments, method) for method in arguments.method]
    base = next((result for result in results if result.method == "full"), results[0])
    columns = (
        "accuracy, %",
        "trainable",
        "optimizer, MB a rank",
        "step",
        "checkpoint, MB",
        "peak memory, MB",
    )
    print("| Method |", " | ".join(columns), "|")
    print("|---|---|---:|---:|---:|---:|---:|")
    for result in results:
        accuracies = ", ".join(f"{100 * accuracy:.1f}" for accuracy in result.accuracies)
        spread = f" (mean {100 * mean(result.accuracies):.1f})" if len(result.accuracies) > 1 else ""
        print(
            f"| {result.method} | {accuracies}{spread} | {result.num_trainable:,} "
            f"| {result.optimizer_bytes / 1e6:.1f} | {result.step_s / base.step_s:.2f} "
            f"| {result.checkpoint_bytes / 1e6:.1f} | {result.peak_memory_bytes / 1e6:,.0f} |",
            flush=True,
        )
    print(f"A step of `{base.method}` took {base.step_s:.3f} s.")


def _result(arguments: argparse.Namespace, method: str) -> Result:
    settings = [*METHODS[method], *arguments.set]
    needs = json.loads(_distft("config", "check", arguments.config, *settings, "--json"))
    accuracies, step_s, peak = [], [], []
    folder = arguments.directory
    for seed in arguments.seeds:
        folder = arguments.directory / f"{''.join(c if c.isalnum() else '_' for c in method)}_{seed}"
        if not (folder / "test.json").exists():
            own = [f"run_dir={folder}", f"seed={seed}", f"data.data_seed={seed}"]
            _distft("train", arguments.config, *settings, *own)
            test = ["validation.type=labelled", f"validation.path={arguments.test}"]
            (folder / "test.json").write_text(_distft("evaluate", str(folder), *test, "--json"))
        accuracies.append(_find(json.loads((folder / "test.json").read_text()), "accuracy"))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        step_s += [row["step_s"] for row in rows if "step_s" in row]
        peak += [row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row]
    files = [path for path in (folder / "checkpoints").rglob("*") if path.is_file()]
    return Result(
        method=method,
        accuracies=accuracies,
        num_trainable=needs["parameters"]["trainable"],
        optimizer_bytes=needs["bytes_per_rank"]["optimizer"],
        step_s=min(step_s),
        checkpoint_bytes=sum(path.stat().st_size for path in files),
        peak_memory_bytes=max(peak),
    )


def _find(found: Any, name: str) -> float:
    """The value of `name` in the outermost object that has it."""
    if name in found:
        return float(found[name])
    return _find(next(value for value in found.values() if isinstance(value, dict)), name)


def _distft(*arguments: str) -> str:
    command = [sys.executable, "-m", "distft", *arguments]
    print("$ distft", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"distft {arguments[0]} ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
