"""Detects the format of a checkpoint from its files, and opens it."""

from distft import storage
from distft.checkpoint.committed import (
    Checkpoint,
    committed_steps,
    find_checkpoint,
    looks_uncommitted,
    sibling_steps_hint,
    uncommitted_notes,
)
from distft.checkpoint.formats.deepspeed_files import LATEST, LATEST_UNIVERSAL
from distft.checkpoint.formats.deepspeed_source import DeepSpeedCheckpoint
from distft.checkpoint.formats.huggingface_files import CONFIG_FILE
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.formats.universal import UniversalCheckpoint
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.sources import CheckpointSource
from distft.errors import UnsupportedFormatError


def open_source(path: str, *, trust: bool = False) -> CheckpointSource:
    """Open the checkpoint at `path`, of any format; reads headers, but no tensors.

    `trust` imports unknown classes that DeepSpeed's pickles name, which can run code. Raises
    `UnsupportedFormatError` if there is no checkpoint that distft reads, `CheckpointError` for a damaged one.
    """
    format_name = detect_format(path)
    if format_name == Checkpoint.format:
        return find_checkpoint(path)
    if format_name == UniversalCheckpoint.format:
        return UniversalCheckpoint.open(path, trust=trust)
    if format_name == DeepSpeedCheckpoint.format:
        return DeepSpeedCheckpoint.open(path, trust=trust)
    return HuggingFaceCheckpoint.open(path)


def detect_format(path: str) -> str:
    """The format of the checkpoint at `path`: the `format` of its source class.

    Raises `UnsupportedFormatError` if there is no checkpoint that distft reads.
    """
    if storage.exists(path) and not storage.is_directory(path):
        raise UnsupportedFormatError(f"{path} is a file: name the directory of a checkpoint.")
    names = set(storage.list_names(path))
    if not names:
        problem = "is empty" if storage.exists(path) else "does not exist"
        raise UnsupportedFormatError(f"{path} {problem}.{sibling_steps_hint(path)}")
    if MANIFEST in names or committed_steps(path) or committed_steps(storage.join(path, "checkpoints")):
        return Checkpoint.format
    if LATEST_UNIVERSAL in names or "zero" in names:
        return UniversalCheckpoint.format
    if LATEST in names or any(name.endswith("_model_states.pt") for name in names):
        return DeepSpeedCheckpoint.format
    if CONFIG_FILE in names:
        return HuggingFaceCheckpoint.format
    if looks_uncommitted(path, names):
        raise UnsupportedFormatError(
            f"{path} is uncommitted: its {MANIFEST} is missing, so it does not count."
            f"{sibling_steps_hint(path)}"
        )
    notes = [note for root in (path, storage.join(path, "checkpoints")) for note in uncommitted_notes(root)]
    raise UnsupportedFormatError(
        "\n".join(notes)
        or f"{path} is not a checkpoint of a known format. A distft checkpoint has {MANIFEST} or step_*/, a "
        f"DeepSpeed checkpoint {LATEST} or *_model_states.pt, a universal one {LATEST_UNIVERSAL}, and a "
        f"transformers model {CONFIG_FILE}. "
        f"It contains {', '.join(sorted(names)[:10])}."
    )
