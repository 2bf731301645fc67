"""The `distft` command: registers the subcommands, and turns errors into messages and exit codes."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from distft.cli import (
    average_verb,
    checkpoint_verbs,
    cluster_verbs,
    config_verbs,
    embed_verbs,
    generate_verbs,
    model_verbs,
    predict_verbs,
    report_verbs,
    text_verbs,
    tune_verbs,
    watch_verb,
)
from distft.errors import CheckpointError, DistftError, Interrupted, Preempted, UnsupportedFormatError

app = typer.Typer(
    help="Train Transformers from raw text to a fine-tuned model, on one machine or an elastic cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(text_verbs.tokenizer_app, name="tokenizer")
app.command("tokenize")(text_verbs.tokenize)
app.command("task")(text_verbs.task)
app.command("train")(model_verbs.train)
app.command("tune")(tune_verbs.tune)
app.command("submit")(cluster_verbs.submit)
app.command("status")(cluster_verbs.status)
app.command("logs")(cluster_verbs.logs)
app.command("evaluate")(model_verbs.evaluate)
app.command("generate")(generate_verbs.generate)
app.command("predict")(predict_verbs.predict)
app.command("embed")(embed_verbs.embed)
app.command("audit")(model_verbs.audit)
app.command("runs")(report_verbs.runs)
app.command("compare")(report_verbs.compare)
app.command("report")(report_verbs.report)
app.command("watch")(watch_verb.watch)
checkpoint_verbs.checkpoint_app.command("average")(average_verb.average)
app.add_typer(checkpoint_verbs.checkpoint_app, name="checkpoint")
app.add_typer(config_verbs.config_app, name="config")


@app.callback()
def _options(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log more, including messages of other libraries.")
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    if not verbose:
        # Deprecations inside torch and DeepSpeed, which users of distft cannot fix.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (0, or as in `distft.errors`; 130 for Ctrl-C).

    A `DistftError` is printed as its message alone, without a traceback.
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
    """Print the error to stderr. All ranks raise the same user error, so only rank 0 prints that."""
    if rank == 0 or error.exit_code == 1:
        prefix = f"rank {rank}: " if rank else ""
        from distft.config import redact_message
        from distft.config.printable import printable

        message = printable(redact_message(str(error)), keep="\n\t")
        print(f"{prefix}{_kind(error)}{message}", file=sys.stderr)


def _kind(error: DistftError) -> str:
    """A prefix such as "config error: ", by the nearest class in `distft.errors`; empty for a stop."""
    if isinstance(error, Preempted | Interrupted):
        return ""
    nearest = next(base for base in type(error).__mro__ if base.__module__ == DistftError.__module__)
    if nearest is UnsupportedFormatError:  # also raised for a path that does not exist
        nearest = CheckpointError
    words = re.findall("[A-Z][a-z]*", nearest.__name__.removesuffix("Error"))
    return f"{' '.join(words).lower()} error: "
