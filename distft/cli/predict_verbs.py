"""`distft predict`."""

import os
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from distft.cli.arguments import expanded, print_note, say
from distft.cli.model_verbs import CheckpointPath, Others, RunSettings, Trust
from distft.topology import Topology

if TYPE_CHECKING:
    from distft.run.combination import Combine
    from distft.run.generate import GenerationOptions

Rows = Annotated[
    str,
    typer.Argument(
        help="A .jsonl, .csv, .tsv or .parquet file of texts; for a model of images a folder, a .parquet "
        "file or one image.",
        callback=expanded,
    ),
]
Output = Annotated[
    str,
    typer.Option(
        "--output", "-o", help="The .jsonl, .csv, .tsv or .parquet file to write.", callback=expanded
    ),
]
_COMBINE = ("mean", "vote", "weights")


MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Of a language model: tokens to add to each row. Default: 128.")
]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Of a language model: end a text before this one; repeatable."),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="Of a language model. Default: 0, always the most likely token."),
]
Seed = Annotated[int | None, typer.Option(help="Of a language model: of what a temperature draws.")]


def predict(
    checkpoint: CheckpointPath,
    rows: Rows,
    output: Output,
    text_column: Annotated[str | None, typer.Option(help="Default: that of the training data.")] = None,
    text_pair_column: Annotated[
        str | None, typer.Option(help="The second text; default: that of the training data.")
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Of a .parquet file of images; default: that of the training data.")
    ] = None,
    others: Others = None,
    combine: Annotated[
        str,
        typer.Option(help="With --with: mean of probabilities, vote, or weights found on validation data."),
    ] = "mean",
    head: Annotated[str | None, typer.Option(help="Of a mixture: the part that predicts.")] = None,
    max_new_tokens: MaxNewTokens = None,
    stop: Stop = None,
    temperature: Temperature = None,
    seed: Seed = None,
    setting: RunSettings = None,
    trust: Trust = False,
) -> None:
    """Write the label, labels or number of each row of a file, with probabilities, or a text behind each.

    Runs in this process, or as one rank of torchrun. An interrupted command goes on where it was.
    """
    from distft.run.environment import prepare_for_torch

    _check_combine(combine, has_others=bool(others))
    topology = Topology.from_env(os.environ)
    prepare_for_torch()
    from distft.run.predict import predict_file
    from distft.run.prediction_rows import PredictOptions
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
                image=image_column,
                head=head,
                others=others or (),
                combine=cast("Combine", combine),
                generation=_generation(max_new_tokens, stop, temperature, seed),
            ),
            overrides=setting or (),
            trust=trust,
            on_note=print_note if topology.is_main else (lambda _: None),
            on_progress=(lambda _: None) if display is None else display.advance,
        )
    if topology.is_main:
        say(f"{output}: {num_rows:,} predictions")


def _generation(
    max_new_tokens: int | None, stop: list[str] | None, temperature: float | None, seed: int | None
) -> "GenerationOptions | None":
    """None if no option of generation was given."""
    from distft.run.prediction_rows import GREEDY

    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "stop": tuple(stop) if stop else None,
        "temperature": temperature,
        "seed": seed,
    }
    known = {name: value for name, value in given.items() if value is not None}
    return replace(GREEDY, **known) if known else None


def _check_combine(combine: str, *, has_others: bool) -> None:
    from distft.errors import ConfigError

    if combine not in _COMBINE:
        raise ConfigError(f"--combine must be one of {', '.join(_COMBINE)}, not {combine}.")
    if combine != "mean" and not has_others:
        raise ConfigError(f"--combine {combine} is for several models: name the others by --with.")
