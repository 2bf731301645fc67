"""`distft predict`."""

import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, cast

import typer

from distft.cli.arguments import expanded, print_note, say
from distft.cli.model_verbs import CheckpointPath, Others, RunSettings, Trust
from distft.topology import Topology

if TYPE_CHECKING:
    from distft.run.combination import Combine

_COMBINE = ("mean", "vote", "weights")


def predict(
    checkpoint: CheckpointPath,
    rows: Annotated[str, typer.Argument(help="A .jsonl, .csv or .tsv file of texts.", callback=expanded)],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", help="The .jsonl, .csv, .tsv or .parquet file to write.", callback=expanded
        ),
    ],
    text_column: Annotated[str | None, typer.Option(help="Default: that of the training data.")] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="The second text; default: that of the training data.")
    ] = None,
    others: Others = None,
    combine: Annotated[
        str,
        typer.Option(help="With --with: mean of probabilities, vote, or weights found on validation data."),
    ] = "mean",
    head: Annotated[str | None, typer.Option(help="Of a mixture: the part that predicts.")] = None,
    setting: RunSettings = None,
    trust: Trust = False,
) -> None:
    """Write the label, labels or number of each row of a file, with probabilities.

    Runs in this process, or as one rank of torchrun. An interrupted command goes on where it was.
    """
    from distft.run.environment import prepare_for_torch

    _check_combine(combine, has_others=bool(others))
    topology = Topology.from_env(os.environ)
    prepare_for_torch()
    from distft.run.predict import PredictOptions, predict_file
    from distft.tracker import progress

    with progress(None, "predicting", "rows") if topology.is_main else nullcontext() as display:
        num_rows = predict_file(
            checkpoint,
            rows,
            output,
            topology,
            PredictOptions(
                text=text_column,
                text_pair=text_pair_column,
                head=head,
                others=others or (),
                combine=cast("Combine", combine),
            ),
            overrides=setting or (),
            trust=trust,
            on_note=print_note if topology.is_main else (lambda _: None),
            on_progress=(lambda _: None) if display is None else display.advance,
        )
    if topology.is_main:
        say(f"{output}: {num_rows:,} predictions")


def _check_combine(combine: str, *, has_others: bool) -> None:
    from distft.errors import ConfigError

    if combine not in _COMBINE:
        raise ConfigError(f"--combine must be one of {', '.join(_COMBINE)}, not {combine}.")
    if combine != "mean" and not has_others:
        raise ConfigError(f"--combine {combine} is for several models: name the others by --with.")
