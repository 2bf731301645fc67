"""Retention: which commits of a run to delete, and their deletion."""

from collections.abc import Callable, Collection, Sequence

from distft import storage
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.frozen import FrozenWeights
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.steps import is_rank_file, list_steps, own_files, step_name
from distft.errors import StorageError


def steps_to_prune(steps: Sequence[int], config: CheckpointConfig, best: int | None = None) -> list[int]:
    """Steps that are neither `best`, the last `keep_last` nor multiples of `keep_every_steps`, ascending."""
    every = config.keep_every_steps
    old = sorted(steps)[: -config.keep_last]
    return [step for step in old if step != best and not (every and step % every == 0)]


def delete_unneeded(
    root: str,
    valid_steps: Sequence[int],
    pruned: Sequence[int],
    frozen: FrozenWeights,
    check: Callable[[], None],
) -> None:
    """Delete `pruned`, some of the valid steps, and unneeded directories older than the newest valid step.

    Uncommitted and damaged steps are unneeded, as are frozen weights that no remaining commit refers to.
    Newer directories stay: another process may be writing them. Before each directory `check` is called,
    which raises if this process may not delete any more. Raises `StorageError` in the end if something
    could not be deleted.
    """
    newest = max(valid_steps, default=0)
    invalid = [step for step in list_steps(root) if step not in valid_steps and step < newest]
    problems = [
        delete_own_files(storage.join(root, step_name(step)), check=check) for step in (*pruned, *invalid)
    ]
    needed = frozen.directories_in_use(step for step in valid_steps if step not in pruned)
    for name, step in frozen.directories():
        if name not in needed and step < newest:
            problems.append(delete_own_files(storage.join(root, name), check=check))
    if any(problems):
        raise StorageError("\n".join(problem for problem in problems if problem))


def delete_own_files(path: str, *, check: Callable[[], None], keep: Collection[str] = ()) -> str:
    """Delete distft's files but `keep` in a directory, and the directory if nothing else is in it.

    The manifest goes first, so that an interrupted deletion leaves no commit with missing files. Returns why
    nothing was deleted, or "".
    """
    if storage.is_link(path):
        return f"{path} is a symbolic link, which is not followed: remove what is no longer needed yourself."
    names = [name for name in own_files(storage.list_names(path)) if name not in keep]
    if MANIFEST not in names and not any(map(is_rank_file, names)):
        names = []  # a tokenizer alone may be anybody's
    drafts = storage.list_temporary_files(path)
    check()  # after the names are known: what a later start writes is not among them
    manifest = storage.join(path, MANIFEST)
    for draft in drafts:  # an earlier start cannot commit here any more
        storage.remove(storage.join(path, draft))
    if MANIFEST in names:
        storage.remove(manifest)
    elif MANIFEST not in keep and storage.exists(manifest):
        return ""  # an earlier start has committed it just now
    # The ranks' files last: they show whose directory it is.
    rest = sorted((name for name in names if name != MANIFEST), key=is_rank_file)
    storage.remove_files(path, rest)
    return ""
