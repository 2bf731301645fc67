"""Prints the demo's results and the paths of its files: `python tools/demo_results.py runs/demo SECONDS`."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distft.tracker import METRICS_FILE, read_lines


def main(demo: Path, seconds: int) -> None:
    """Read the files of the demo's runs and print one table."""
    table = Table(
        title=f"The demo, {seconds // 60} min {seconds % 60} s", title_justify="left", show_header=False
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_column(style="dim", no_wrap=True)
    for stage, result, path in rows(demo):
        table.add_row(stage, escape(result), path)
    Console().print(table)


def rows(demo: Path) -> Iterator[tuple[str, str, str]]:
    """For each stage of the demo: its name, its result, the path of its files."""
    shards = _json(demo / "shards" / "train" / "manifest.json")
    yield "corpus", f"{shards['num_tokens']:,} tokens of Python's standard library", f"{demo}/shards"
    pretrain = _metrics(demo / "pretrain")
    losses = _losses(pretrain)
    held_out = pretrain[-1]
    yield (
        "pretraining",
        f"2 ranks, ZeRO 2: loss {losses[min(losses)]:.2f} at step {min(losses)}, "
        f"{losses[max(losses)]:.2f} at step {max(losses)}; held-out {held_out['validation/loss']:.2f} "
        f"({held_out['validation/bits_per_byte']:.2f} bits a byte)",
        f"{demo}/pretrain",
    )
    resumed = _losses(_metrics(demo / "one_rank"))
    difference = max((abs(loss - losses[step]) for step, loss in resumed.items()), default=math.nan)
    yield (
        "resumed",
        f"1 rank without ZeRO: losses of steps {min(resumed)} to {max(resumed)} "
        f"differ by at most {difference:.1e}",
        f"{demo}/one_rank",
    )
    parameters = _json(_last_checkpoint(demo / "finetune") / "manifest.json")["parameters"]
    numels = {name: math.prod(parameter["shape"]) for name, parameter in parameters.items()}
    num_trainable = sum(numels[name] for name, parameter in parameters.items() if parameter["trainable"])
    yield (
        "fine-tuning",
        f"{num_trainable:,} of {sum(numels.values()):,} parameters learned; "
        f"loss {_metrics(demo / 'finetune')[-1]['loss']:.2f}",
        f"{demo}/finetune",
    )
    task, test = _json(demo / "task" / "task.json"), _json(demo / "test.json")
    areas = task["areas"]
    yield (
        "classifier",
        f"accuracy {test['accuracy']:.1%}, macro-F1 {test['macro_f1']:.1%} on {task['num_test']:,} functions "
        f"from {len(areas)} areas; always the largest area: {max(areas.values()) / sum(areas.values()):.1%}",
        f"{demo}/test.json",
    )
    yield "sample", (demo / "sample.txt").read_text(encoding="utf-8").strip(), f"{demo}/sample.txt"


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return list(read_lines(run_dir / METRICS_FILE))


def _losses(metrics: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics if "loss" in line}


def _last_checkpoint(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step_*"))


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
