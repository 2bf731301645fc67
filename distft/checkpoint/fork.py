"""Lets a new run begin with a commit of another: the same fragments, under a manifest of its own.

The new run resumes from it, so the optimizer's moments, the step and the order of data go on, on any number
of ranks. On one disk the files are linked, not copied; either run may delete its own names.
"""

import os
import secrets
from pathlib import Path

from distft import storage
from distft.checkpoint.committed import SIBLING_PREFIX, Checkpoint
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.steps import step_name
from distft.errors import CheckpointError


def fork_commit(source_root: str, step: int, target_root: str) -> str:
    """Commit `step` of the checkpoints at `source_root` as the first one of a new run; returns its path.

    The manifest is written last. Raises `CheckpointError` if the step is not committed, or `target_root` has
    checkpoints.
    """
    source = Checkpoint.open(storage.join(source_root, step_name(step)))
    target = storage.join(target_root, step_name(step))
    if any(
        storage.exists(storage.join(target_root, name, MANIFEST)) for name in storage.list_names(target_root)
    ):
        raise CheckpointError(f"{target_root} has checkpoints of a run: a fork needs a new directory.")
    for number, file in enumerate(source.manifest.files):
        below = file.name.removeprefix(SIBLING_PREFIX)
        own = storage.join(target_root if file.name.startswith(SIBLING_PREFIX) else target, below)
        _link_or_copy(source.file_path(number), own)
    record = source.manifest.tokenizer
    if record is not None and record.file is not None:
        for name in storage.list_names(source.path):
            if name != MANIFEST and not name.startswith("rank_"):  # the tokenizer and its companions
                _link_or_copy(storage.join(source.path, name), storage.join(target, name))
    manifest = source.manifest.model_copy(update={"run_id": secrets.token_hex(4)})
    storage.commit_bytes(storage.join(target, MANIFEST), manifest.to_bytes())
    return target


def _link_or_copy(source: str, target: str) -> None:
    """Nothing overwrites a committed file, so two runs can share its bytes."""
    storage.make_directory(storage.parent(target))
    local_source, local_target = storage.local_path(source), storage.local_path(target)
    if local_source is not None and local_target is not None:
        try:
            Path(local_target).unlink(missing_ok=True)  # of a fork that did not come to its manifest
            os.link(local_source, local_target)
            return
        except OSError:
            pass  # another disk, or a file system without links
    storage.copy(source, target)
