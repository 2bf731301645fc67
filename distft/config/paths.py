"""The paths of settings and of the command line: the one place that expands `~`."""

import os.path
from typing import Annotated

from pydantic import AfterValidator

_LOCAL_PREFIXES = ("file://", "local://")


def expand_path(path: str) -> str:
    """`path` with a home directory in place of `~` or `~user` at its beginning; a URL or other path as it is.

    Raises `ValueError` for an empty path, for one that no file system accepts, and for an unknown user.
    `./~name` means a file whose own name begins so.
    """
    if not path.strip():
        raise ValueError("a path must not be empty")
    if "\0" in path:
        raise ValueError("a path must not contain the character NUL")
    prefix = next((p for p in _LOCAL_PREFIXES if path.startswith(p)), "")
    local = path.removeprefix(prefix)
    if not local.startswith("~"):
        return path
    expanded = os.path.expanduser(local)  # noqa: PTH111 - pathlib's raises another error
    if expanded.startswith("~"):
        user = local.partition("/")[0]
        raise ValueError(
            f"{user} is not the home of a user of this machine; write ./{local} for a file of that name"
        )
    return expanded


PathText = Annotated[str, AfterValidator(expand_path)]  # the type of a setting that is a path or a URL
