"""Directories of steps below a run's checkpoints, and the files in them: names, and which are committed.

Reads names only, without torch.
"""

import os
import re
from collections.abc import Iterable

from distft import storage
from distft.checkpoint.manifest import MANIFEST
from distft.errors import CheckpointError
from distft.tokenizer.files import OWN_FILES as TOKENIZER_FILES

STEP_PREFIX = "step_"
_OWN_FILE = re.compile(
    rf"rank_\d{{5,}}(_\w+)?\.safetensors|{re.escape(MANIFEST)}|{'|'.join(map(re.escape, TOKENIZER_FILES))}"
)


def step_name(step: int) -> str:
    """Name of the directory of a step's checkpoint."""
    return f"{STEP_PREFIX}{step:08d}"


def list_steps(root: str) -> list[int]:
    """Steps that have a directory, committed or not, ascending."""
    names = (n.removeprefix(STEP_PREFIX) for n in storage.list_names(root) if n.startswith(STEP_PREFIX))
    return sorted(int(name) for name in names if name.isdecimal())


def committed_steps(root: str) -> list[int]:
    """Steps that have a manifest, ascending."""
    steps = list_steps(root)
    return [step for step in steps if storage.exists(storage.join(root, step_name(step), MANIFEST))]


def uncommitted_notes(root: str, *, after: int = -1) -> list[str]:
    """A sentence for each step later than `after` that has a directory but no manifest."""
    committed = set(committed_steps(root))
    return [
        f"{storage.join(root, step_name(step))} is uncommitted: it has no {MANIFEST}."
        for step in list_steps(root)
        if step > after and step not in committed
    ]


def looks_uncommitted(path: str, names: Iterable[str]) -> bool:
    """Whether a directory without a manifest is named like a step, or contains a rank's file."""
    own_name = absolute(path).rpartition("/")[2]
    is_step = own_name.startswith(STEP_PREFIX) and own_name.removeprefix(STEP_PREFIX).isdecimal()
    return is_step or any(is_rank_file(name) for name in names)


def find_checkpoint_directory(path: str) -> str:
    """Directory of the checkpoint at `path`, or of the newest commit of the run or `checkpoints` there.

    Raises `CheckpointError` if there is none.
    """
    if storage.exists(storage.join(path, MANIFEST)):
        return path
    for root in (storage.join(path, "checkpoints"), path):
        steps = committed_steps(root)
        if steps:
            return storage.join(root, step_name(steps[-1]))
    raise CheckpointError(
        f"No committed checkpoint at {path} (looked for {MANIFEST}, {STEP_PREFIX}*/ and "
        f"checkpoints/{STEP_PREFIX}*/).{sibling_steps_hint(path)}"
    )


def sibling_steps_hint(path: str) -> str:
    """A sentence that lists the commits beside `path`; empty if there are none."""
    siblings = [step_name(step) for step in committed_steps(storage.parent(absolute(path)))]
    return f" Beside it: {', '.join(siblings)}." if siblings else ""


def absolute(path: str) -> str:
    """`path` without `.`, `..` and a final slash, so that its last name and its parent can be read off it.

    Symbolic links are kept: beside a link lies what was put there with it.
    """
    local = storage.local_path(path)
    return path.rstrip("/") if local is None else os.path.abspath(local)  # noqa: PTH100 - keeps links


def rank_file_name(rank: int, attempt: str = "") -> str:
    """Name of the file that `rank` writes; `attempt` distinguishes it from those of other starts."""
    return f"rank_{rank:05d}{attempt and f'_{attempt}'}.safetensors"


def own_files(names: Iterable[str]) -> list[str]:
    """Those of the names in a step's directory that distft gives: nothing else there may be removed."""
    return [name for name in names if _OWN_FILE.fullmatch(name)]


def is_rank_file(name: str) -> bool:
    """Whether `name` is that of a file that a rank wrote."""
    return name.startswith("rank_") and name.endswith(".safetensors")
