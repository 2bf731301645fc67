"""Names of files: local paths and URLs, told apart and put together without asking any file system."""

import os
import re
from pathlib import Path

AnyPath = str | os.PathLike[str]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(?:://|::)")


def is_url(path: AnyPath) -> bool:
    """Whether `path` is reached through fsspec: it has a protocol, and that is not `file`."""
    text = os.fspath(path)
    return bool(_URL.match(text)) and not text.startswith(("file://", "local://"))


def local_path(path: AnyPath) -> Path | None:
    """The path on this machine, or None where the file lies elsewhere."""
    if is_url(path):
        return None
    return Path(os.fspath(path).removeprefix("file://").removeprefix("local://"))


def join(path: AnyPath, *parts: str) -> str:
    """`path` with `parts` below it, for local paths and URLs alike."""
    here = local_path(path)
    if here is not None:
        return str(here.joinpath(*parts))
    text = os.fspath(path)
    for part in parts:
        text = (
            f"{text.rstrip('/')}/{part.strip('/')}"
            if not text.endswith("://")
            else f"{text}{part.strip('/')}"
        )
    return text


def parent_and_name(path: AnyPath) -> tuple[str, str]:
    """The directory of `path` and the last part of it."""
    text = os.fspath(path).rstrip("/")
    parent, _, name = text.rpartition("/")
    return parent or ("/" if text.startswith("/") else "."), name


def parent(path: AnyPath) -> str:
    """The directory of `path`."""
    return parent_and_name(path)[0]
