"""The verbs, and what becomes of their failures."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from distft.cli import checkpoint_verbs, cluster_verbs, config_verbs, model_verbs, text_verbs
from distft.errors import DistftError, Preempted

app = typer.Typer(
    help="Text to a fine-tuned Transformer, on one machine or on a cluster whose nodes come and go.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(text_verbs.tokenizer_app, name="tokenizer")
app.command("tokenize")(text_verbs.tokenize)
app.command("task")(text_verbs.task)
app.command("train")(model_verbs.train)
app.command("submit")(cluster_verbs.submit)
app.command("status")(cluster_verbs.status)
app.command("logs")(cluster_verbs.logs)
app.command("evaluate")(model_verbs.evaluate)
app.command("generate")(model_verbs.generate)
app.command("audit")(model_verbs.audit)
app.add_typer(checkpoint_verbs.checkpoint_app, name="checkpoint")
app.add_typer(config_verbs.config_app, name="config")


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say more, third parties' words too.")
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    if not verbose:
        # torch and DeepSpeed warn each other of deprecations that no user of ours can mend.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 2 the user's mistake, 1 a failure of the run, 75 stopped.

    A failure that distft foresees is told in its own words, without a traceback.
    """
    try:
        app(args=None if argv is None else list(argv), standalone_mode=True)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except DistftError as error:
        report(error, rank=int(os.environ.get("RANK", "0")))
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def report(error: DistftError, *, rank: int) -> None:
    """Tell the user. Every rank finds the same mistake of the user's, so one rank tells it."""
    if rank == 0 or error.exit_code == 1:
        where = f"rank {rank}: " if rank else ""
        print(f"{where}{_kind(error)}{error}", file=sys.stderr)


def _kind(error: DistftError) -> str:
    """The kind of fault, by the class that distft.errors has for it; a stop that was asked for is none."""
    if isinstance(error, Preempted):
        return ""
    known = next(kind for kind in type(error).__mro__ if kind.__module__ == DistftError.__module__)
    return f"{known.__name__.removesuffix('Error').lower()} error: "
