"""Distinguishes, joins and splits local paths and URLs, without any file system call."""

import os
import re
from pathlib import Path

AnyPath = str | os.PathLike[str]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*(?:://|::)")


def is_url(path: AnyPath) -> bool:
    """Whether `path` has a protocol other than `file`, and so is reached through fsspec."""
    text = os.fspath(path)
    return bool(_URL.match(text)) and not text.startswith(("file://", "local://"))


def local_path(path: AnyPath) -> Path | None:
    """`path` as a path on this machine, or None for a URL."""
    if is_url(path):
        return None
    return Path(os.fspath(path).removeprefix("file://").removeprefix("local://"))


def join(path: AnyPath, *names: str) -> str:
    """`path` followed by `names`; a local path or a URL."""
    local = local_path(path)
    if local is not None:
        return str(local.joinpath(*names))
    text = os.fspath(path)
    for name in names:
        base = text if text.endswith("://") else f"{text.rstrip('/')}/"
        text = f"{base}{name.strip('/')}"
    return text


def parent_and_name(path: AnyPath) -> tuple[str, str]:
    """The directory of `path`, and its last name."""
    text = os.fspath(path).rstrip("/")
    parent, _, name = text.rpartition("/")
    return parent or ("/" if text.startswith("/") else "."), name


def parent(path: AnyPath) -> str:
    """The directory of `path`."""
    return parent_and_name(path)[0]
