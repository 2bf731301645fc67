"""`distft config`: check or print a configuration without running it."""

import json
import sys
from typing import Annotated

import typer

from distft.cli.arguments import ConfigPath, Overrides

_MOST_RANKS = 1_000_000

config_app = typer.Typer(
    help="Check a configuration, print it with defaults, or print its JSON schema.", no_args_is_help=True
)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema, which editors use to complete and check the YAML."""
    from distft.config import json_schema
    from distft.search.search_file import FileSettings

    print(json.dumps(json_schema(FileSettings), indent=2))


@config_app.command("show")
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the configuration with all defaults, without secrets."""
    from distft.config import dump_yaml
    from distft.run.config import load_run_config

    print(dump_yaml(load_run_config(config, overrides or ()), redacted=True), end="")


@config_app.command("check")
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(min=1, max=_MOST_RANKS, help="Number of ranks of the run.")] = 1,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of the peak that the run reaches, for its time."),
    ] = None,
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.0, help="Peak of one rank's device in TFLOP/s, for the time.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check the configuration and its inputs, and tell what the run needs: memory, disk, steps and time.

    Exit code 2 if the run cannot start; settings that are odd or have no effect are told as warnings.
    """
    from distft.config import redact_message
    from distft.errors import ConfigError
    from distft.run.check import describe_run
    from distft.run.config import load_run_config

    if (mfu is None) != (peak_tflops is None) or 0 in {mfu, peak_tflops}:
        raise ConfigError("The time of a run needs both --mfu and --peak-tflops, each more than 0.")
    settings = load_run_config(config, overrides or ())
    checked = describe_run(settings, world_size, (mfu, peak_tflops) if mfu and peak_tflops else None)
    if as_json:
        print(json.dumps({**checked.needs.as_json(), "warnings": checked.remarks}, indent=1))
        return
    print(redact_message("\n".join(checked.lines)))
    for remark in checked.remarks:
        print(f"warning: {remark}", file=sys.stderr)
