"""`distft checkpoint average`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from distft.cli.arguments import existing_checkpoints, expanded, print_note, say
from distft.cli.checkpoint_verbs import write_checkpoint
from distft.cli.opening import Trust, open_with_notes

if TYPE_CHECKING:
    from distft.run.soup import Soup


def average(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="Two or more checkpoints of the same model.",
            callback=existing_checkpoints,
        ),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="A new directory.", callback=expanded)],
    weight: Annotated[
        list[float] | None,
        typer.Option(help="Relative weight of one checkpoint; repeat it for each; default: all equal."),
    ] = None,
    greedy: Annotated[
        bool,
        typer.Option("--greedy", help="Keep those that do not worsen the average on the validation data."),
    ] = False,
    metric: Annotated[
        str | None, typer.Option(help="For --greedy: what decides; default: accuracy or its like, or loss.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="For --greedy: a setting of the evaluation, such as validation.path=rows."
        ),
    ] = None,
    trust: Trust = False,
) -> None:
    """Average the weights of several checkpoints, for use with init_from, evaluate or convert."""
    if greedy or metric is not None or setting:
        if not greedy or weight is not None:
            from distft.errors import ConfigError

            raise ConfigError("--metric and --set are for --greedy, and --weight is not: leave them out.")
        soup = _print_greedy_soup(checkpoints, metric, setting or (), trust=trust)
        write_checkpoint(soup.source, output, {"to": "distft"}, checkpoints, soup.summary)
        return
    from distft.checkpoint.adapters import merged
    from distft.checkpoint.average import AveragedCheckpoint

    # The mean of two products is not the product of the means.
    sources = [merged(open_with_notes(path, trust, weights_only=True)) for path in checkpoints]
    mean = AveragedCheckpoint(sources, weight)
    write_checkpoint(mean, output, {"to": "distft"}, checkpoints, mean.summary)


def _print_greedy_soup(
    checkpoints: Sequence[str], metric: str | None, setting: Sequence[str], *, trust: bool
) -> "Soup":
    """The soup. Prints for each checkpoint its figure, that of the soup with it, and what became of it."""
    from distft.run.environment import prepare_for_torch

    prepare_for_torch()
    from distft.run.soup import greedy_soup

    soup = greedy_soup(checkpoints, metric, setting, trust=trust, on_note=print_note)
    width = max(len(one.path) for one in soup.ingredients)
    say(f"{'':<{width}}  {soup.metric:>10}  with soup")
    for one in soup.ingredients:
        together = "" if one.with_soup is None else f"{one.with_soup:.6g}"
        say(
            f"{one.path:<{width}}  {one.value:>10.6g}  {together:>9}  {'kept' if one.is_kept else 'left out'}"
        )
    say(f"{'soup':<{width}}  {soup.value:>10.6g}")
    return soup
