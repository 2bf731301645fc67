"""Arguments that several commands share."""

from typing import Annotated

import typer

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override settings of the file, by dotted key."),
]


def existing_checkpoint(path: str) -> str:
    """For a command's argument: raises `UnsupportedFormatError` if there is no checkpoint at `path`.

    Names are enough to see that. What reads checkpoints comes with torch, which takes 2 s to import.
    """
    from distft.checkpoint.formats.detect import detect_format

    detect_format(path)
    return path


def existing_checkpoints(paths: list[str]) -> list[str]:
    """As `existing_checkpoint`, for several."""
    return [existing_checkpoint(path) for path in paths]
