"""A full disk, told so that the user can act."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distft.errors import StorageError
from distft.storage.paths import AnyPath, local_path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def full_disk_explained(path: AnyPath, num_bytes: int | None = None) -> Iterator[None]:
    """Turn the system's "no space left" into a `StorageError` about `path`; other errors pass.

    `num_bytes` is what was to be written inside. Use it around foreign code that writes files by itself.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        wanted = "" if num_bytes is None else f" for {num_bytes:,} bytes"
        quota = " of the quota" if error.errno == errno.EDQUOT else ""
        raise StorageError(
            f"{path}: no space left{quota}{wanted}; {_free(path)}. Free some space there or choose another "
            "place, then start again: what was committed before is unharmed."
        ) from error


def _free(path: AnyPath) -> str:
    here = local_path(path)
    if here is None:
        return "how much is free is not known"
    existing = next((p for p in (here, *here.absolute().parents) if p.exists()), Path("/"))
    return f"{shutil.disk_usage(existing).free:,} bytes are free"
