"""What a report and a chart need before they are written: the library that draws, and a file of their own."""

import os
from pathlib import Path
from typing import Any

from distft.errors import ConfigError

_MARKED_BYTES = 200  # at one end of a file


def drawing_library(what: str) -> Any:
    """The module `vl_convert`, which has Vega. Raises `ConfigError` if it is not installed."""
    try:
        import vl_convert
    except ImportError:
        raise ConfigError(
            f"A {what} needs vl-convert-python, which draws: pip install 'distft[report]'."
        ) from None
    return vl_convert


def require_free_or_own(path: Path, mark: str, what: str, *, is_mark_last: bool) -> None:
    """Raise `ConfigError` if the folder is not there, or at `path` is something without the mark."""
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no directory: make it, or name a file elsewhere.")
    if path.is_dir() or (path.exists() and mark.encode() not in _end_of(path, is_last=is_mark_last)):
        raise ConfigError(f"{path} exists, and is no {what} of distft: name another file.")


def _end_of(path: Path, *, is_last: bool) -> bytes:
    with path.open("rb") as file:
        if is_last:
            file.seek(max(file.seek(0, os.SEEK_END) - _MARKED_BYTES, 0))
        return file.read(_MARKED_BYTES)
