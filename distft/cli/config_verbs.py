"""`distft config`: check or print a configuration without running it."""

import json
from typing import Annotated

import typer

from distft.cli.arguments import ConfigPath, Overrides

config_app = typer.Typer(
    help="Check a configuration, print it with defaults, or print its JSON schema.", no_args_is_help=True
)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema, which editors use to complete and check the YAML."""
    from distft.config import json_schema
    from distft.run.config import RunConfig

    print(json.dumps(json_schema(RunConfig), indent=2))


@config_app.command("show")
def show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the configuration with all defaults."""
    from distft.config import dump_yaml
    from distft.run.config import load_run_config

    print(dump_yaml(load_run_config(config, overrides or ())), end="")


@config_app.command("check")
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(help="Number of ranks of the run.")] = 1,
) -> None:
    """Check the configuration and its inputs: tokenizer, data, checkpoint, parameters."""
    from distft.run.check import describe_run
    from distft.run.config import load_run_config

    for line in describe_run(load_run_config(config, overrides or ()), world_size):
        print(line)
