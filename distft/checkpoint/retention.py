"""Retention: which commits of a run to delete, and their deletion."""

from collections.abc import Sequence

from distft import storage
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.frozen import FROZEN_PREFIX, FrozenWeights
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.steps import list_steps, step_name


def steps_to_prune(steps: Sequence[int], config: CheckpointConfig) -> list[int]:
    """Steps that are neither among the last `keep_last` nor multiples of `keep_every_steps`, ascending."""
    every = config.keep_every_steps
    return [step for step in sorted(steps)[: -config.keep_last] if not (every and step % every == 0)]


def delete_unneeded(
    root: str, valid_steps: Sequence[int], pruned: Sequence[int], frozen: FrozenWeights
) -> None:
    """Delete `pruned`, some of the valid steps, and unneeded directories older than the newest valid step.

    Uncommitted and damaged steps are unneeded, as are frozen weights that no remaining commit refers to.
    Newer directories stay: another process may be writing them.
    """
    newest = max(valid_steps, default=0)
    invalid = [step for step in list_steps(root) if step not in valid_steps and step < newest]
    for step in (*pruned, *invalid):
        # The manifest goes first, so that an interrupted deletion leaves no commit with missing files.
        storage.remove_tree(storage.join(root, step_name(step)), first=[MANIFEST])
    needed = {name for step in valid_steps if step not in pruned for name in frozen.directories_of(step)}
    for name in storage.list_names(root):
        number = name.removeprefix(FROZEN_PREFIX)
        is_frozen = name.startswith(FROZEN_PREFIX) and number.isdecimal()
        if is_frozen and name not in needed and int(number) < newest:
            storage.remove_tree(storage.join(root, name))
