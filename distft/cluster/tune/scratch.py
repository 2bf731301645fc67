"""Ray Tune's own files of a search, which are of no use once the process that runs the search has ended."""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

EXPERIMENT = "search"  # Ray Tune's name of what it runs: the one entry of its folder
_PREFIX = ".ray_"
_NAME = re.compile(rf"{re.escape(_PREFIX)}[a-z0-9_]{{8}}")  # as tempfile names it


@contextlib.contextmanager
def scratch_directory(directory: Path) -> Iterator[str]:
    """A new folder for Ray Tune in the search's directory, which all nodes share; removed at the end."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=directory) as path:
        yield path


def remove_dead_scratch(directory: Path) -> None:
    """Remove the folders of killed processes. Call it with the search's lock, before Ray Tune starts."""
    for path in directory.glob(f"{_PREFIX}*"):
        if path.is_symlink() or not path.is_dir() or not _NAME.fullmatch(path.name):
            continue
        if {child.name for child in path.iterdir()} <= {EXPERIMENT}:
            shutil.rmtree(path, ignore_errors=True)
