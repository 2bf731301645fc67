"""Which format a checkpoint is in, by the files that are there."""

from distft import storage
from distft.checkpoint.committed import (
    Checkpoint,
    committed_steps,
    find_checkpoint,
    looks_like_draft,
    steps_beside,
    uncommitted,
)
from distft.checkpoint.formats.deepspeed_files import LATEST, LATEST_UNIVERSAL
from distft.checkpoint.formats.deepspeed_source import DeepSpeedCheckpoint
from distft.checkpoint.formats.huggingface_files import CONFIG_FILE
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.formats.universal import UniversalCheckpoint
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.sources import CheckpointSource
from distft.checkpoint.unread import UnreadError


def open_source(path: str, *, trust: bool = False) -> CheckpointSource:
    """The checkpoint at `path`, in whatever format; reads headers, no state.

    `trust` lets classes in DeepSpeed's pickles be imported that are not known to be harmless. Raises
    `UnreadError` where there is no checkpoint that is read here, `CheckpointError` for a damaged one.
    """
    found = format_at(path)
    if found == Checkpoint.format:
        return find_checkpoint(path)
    if found == UniversalCheckpoint.format:
        return UniversalCheckpoint.open(path, trust=trust)
    if found == DeepSpeedCheckpoint.format:
        return DeepSpeedCheckpoint.open(path, trust=trust)
    return HuggingFaceCheckpoint.open(path)


def format_at(path: str) -> str:
    """The format of the checkpoint at `path`, as sources name theirs. Raises `UnreadError` for none."""
    if storage.exists(path) and not storage.is_directory(path):
        raise UnreadError(f"{path} is a file: name the directory of a checkpoint.")
    names = set(storage.list_names(path))
    if not names:
        state = "is empty" if storage.exists(path) else "does not exist"
        raise UnreadError(f"{path} {state}.{steps_beside(path)}")
    if MANIFEST in names or committed_steps(path) or committed_steps(storage.join(path, "checkpoints")):
        return Checkpoint.format
    if LATEST_UNIVERSAL in names or "zero" in names:
        return UniversalCheckpoint.format
    if LATEST in names or any(name.endswith("_model_states.pt") for name in names):
        return DeepSpeedCheckpoint.format
    if CONFIG_FILE in names:
        return HuggingFaceCheckpoint.format
    if looks_like_draft(path, names):
        raise UnreadError(
            f"{path} is a draft: its {MANIFEST} is missing, so it does not count.{steps_beside(path)}"
        )
    drafts = [note for root in (path, storage.join(path, "checkpoints")) for note in uncommitted(root)]
    raise UnreadError(
        "\n".join(drafts)
        or f"{path} is no checkpoint that is known here. Of ours it has {MANIFEST}, or step_*/; of DeepSpeed "
        f"{LATEST} or *_model_states.pt; of its universal format {LATEST_UNIVERSAL}; of transformers "
        f"{CONFIG_FILE}. It holds {', '.join(sorted(names)[:10])}."
    )
