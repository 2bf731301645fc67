"""`distft train`, `evaluate` and `audit`."""

import json
import os
from typing import Annotated

import typer

from distft.cli.arguments import (
    ConfigPath,
    Overrides,
    existing_checkpoint,
    existing_checkpoints,
    expanded,
    print_note,
)
from distft.topology import Topology

CheckpointPath = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A run (its newest or best checkpoint), one checkpoint, or a directory of transformers.",
        callback=existing_checkpoint,
    ),
]
RunSettings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the run as key=value, such as batch.micro_batch_size=64."),
]
Others = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="CHECKPOINT",
        help="Another classifier of the same labels, for an ensemble; repeatable.",
        callback=lambda paths: existing_checkpoints(paths or []),
    ),
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Import classes that the run's configuration names, which runs their code."),
]


def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Pretrain or fine-tune as configured in CONFIG; resumes from the run's latest checkpoint.

    Runs in this process, or as one rank of torchrun, deepspeed or Ray.
    """
    from distft.run.check import check_before_torch
    from distft.run.config import load_run_config
    from distft.run.environment import collector_paused, configure_environment, prepare_for_torch

    settings = load_run_config(config, overrides or ())
    check_before_torch(settings, Topology.from_env(os.environ))
    prepare_for_torch()
    with collector_paused():
        from distft.run.train import run_training

    run_training(settings, configure_environment(settings.device))


def evaluate(
    checkpoint: CheckpointPath,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Override the run's settings, such as 'validation.sources.0.path=shards' for tokens, "
            "'validation.path=rows.jsonl' for other data.",
        ),
    ] = None,
    others: Others = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trust: Trust = False,
) -> None:
    """Evaluate a run, a checkpoint or a directory of transformers on validation data, its own or other."""
    from distft.run.environment import prepare_for_torch

    topology = Topology.from_env(os.environ)
    prepare_for_torch()
    from distft.run.pretrained import evaluate_checkpoint

    on_note = print_note if topology.is_main else (lambda _: None)
    if others:
        from distft.cli.ensemble_table import print_ensemble
        from distft.run.ensemble import evaluate_ensemble

        report = evaluate_ensemble(
            [checkpoint, *others], overrides or (), topology, trust=trust, on_note=on_note
        )
        if topology.is_main:
            print_ensemble(report, as_json=as_json)
        return
    lines: list[str] = []
    metrics = evaluate_checkpoint(
        checkpoint, overrides or (), topology, trust=trust, on_note=on_note, on_report=lines.extend
    )
    if not topology.is_main:
        return
    if as_json:
        print(json.dumps(metrics))
        return
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.6g}")
    if lines:
        print()
        print("\n".join(lines))


def audit(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run_dir of a run.", callback=expanded)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trust: Trust = False,
) -> None:
    """Check from a run's events that it used every sequence exactly once. Exit code 1 if it did not."""
    from dataclasses import asdict

    from distft.run.audit import audit_run

    found, why_not_counted = audit_run(run, trust=trust)
    if as_json:
        print(json.dumps({**asdict(found), "is_exact": found.is_exact, "rows_unknown": why_not_counted}))
    else:
        sizes = " -> ".join(map(str, found.world_sizes))
        print(
            f"step {found.step}, {_count(found.num_starts, 'start')}, ranks {sizes}, "
            f"{_count(found.num_lost_steps, 'step')} done again"
        )
        if found.num_uncommitted_steps:
            print(f"not saved yet: {_count(found.num_uncommitted_steps, 'step')} after step {found.step}")
        for use, intervals in (("never used", found.missing), ("used more than once", found.repeated)):
            for start, stop in intervals:
                print(f"sequences {start:,} to {stop - 1:,} of the run's order were {use}")
        if found.is_exact:
            print(f"each of the {found.num_sequences:,} sequences up to that step was used exactly once")
        if found.uses_per_row is not None:
            for source in found.uses_per_row:
                print(
                    f"each of the {source.num_rows:,} rows of {source.name} was used {source.least:,} to "
                    f"{source.most:,} times"
                )
        else:
            print(f"uses per row of the data were not counted: {why_not_counted}")
    if not found.is_exact:
        raise typer.Exit(1)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
