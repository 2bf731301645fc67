"""Arguments that several commands share."""

import sys
from pathlib import Path
from typing import Annotated, TextIO, TypeVar

import typer

from distft.errors import ConfigError

AnyPath = TypeVar("AnyPath", str, Path)


def expanded(path: AnyPath) -> AnyPath:
    """For an argument that is a path: `~` at its beginning is expanded. Raises `ConfigError`."""
    from distft.config import expand_path

    try:
        return type(path)(expand_path(str(path)))
    except ValueError as error:
        raise ConfigError(f"{str(path)!r}: {error}.") from None


def all_expanded(paths: list[str]) -> list[str]:
    """As `expanded`, for several."""
    return [expanded(path) for path in paths]


def say(text: str, *, file: TextIO | None = None) -> None:
    """Print lines that may contain a path, a URL or a name: without a login or control characters."""
    from distft.config import redact_message
    from distft.config.printable import printable

    print(printable(redact_message(text), keep="\n"), file=file or sys.stdout)


def print_note(note: str) -> None:
    """Print to stderr what the user should know."""
    say(f"note: {note}", file=sys.stderr)


def existing_checkpoint(path: str) -> str:
    """For a command's argument: raises `UnsupportedFormatError` if there is no checkpoint at `path`.

    Names are enough to see that. What reads checkpoints comes with torch, which takes 2 s to import.
    """
    from distft.checkpoint.formats.detect import detect_format

    path = expanded(path)
    detect_format(path)
    return path


def existing_checkpoints(paths: list[str]) -> list[str]:
    """As `existing_checkpoint`, for several."""
    return [existing_checkpoint(path) for path in paths]


ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.", callback=expanded)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override settings of the file, by dotted key."),
]
