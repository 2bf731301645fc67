"""Detects the format of a checkpoint from its files, and opens it.

The readers are imported for a checkpoint that they read: a wrong path is reported without torch, 2 s sooner.
"""

from typing import TYPE_CHECKING

from distft import storage
from distft.checkpoint.formats.names import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    CONFIG_FILE,
    LATEST,
    LATEST_UNIVERSAL,
    MODEL_STATES,
    list_tags,
)
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.steps import (
    committed_steps,
    looks_uncommitted,
    sibling_steps_hint,
    uncommitted_notes,
)
from distft.errors import CheckpointError, UnsupportedFormatError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distft.checkpoint.committed import Checkpoint
    from distft.checkpoint.sources import CheckpointSource


def open_source(
    path: str,
    *,
    trust: bool = False,
    weights_only: bool = False,
    parameter_groups: "Sequence[Sequence[str]] | None" = None,
) -> "CheckpointSource":
    """Open the checkpoint at `path`, of any format; reads headers, but no tensors.

    `trust` imports unknown classes that DeepSpeed's pickles name, which can run code. With `weights_only`, no
    states of the optimizer are needed: model.safetensors beside DeepSpeed's files is preferred to them.
    `parameter_groups` names the parameters of DeepSpeed's stage 0, group by group. Raises
    `UnsupportedFormatError` if there is no checkpoint that distft reads, `CheckpointError` for a damaged one.
    """
    format_name = detect_format(path)
    if format_name == "distft":
        from distft.checkpoint.committed import find_checkpoint

        checkpoint = find_checkpoint(path)
        attach_base(checkpoint)
        return checkpoint
    if format_name == "universal":
        from distft.checkpoint.formats.deepspeed.transformers_model import with_distft_names
        from distft.checkpoint.formats.deepspeed.universal import UniversalCheckpoint

        return with_distft_names(UniversalCheckpoint.open(path, trust=trust), path)
    if format_name == "deepspeed":
        from distft.checkpoint.formats.deepspeed.transformers_model import open_deepspeed

        return open_deepspeed(path, trust=trust, groups=parameter_groups, weights_only=weights_only)
    if format_name == "peft":
        from distft.checkpoint.formats.peft_source import PeftCheckpoint

        return PeftCheckpoint.open(path)
    from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint

    return HuggingFaceCheckpoint.open(path)


def attach_base(checkpoint: "Checkpoint") -> None:
    """Open what `checkpoint` refers to, at its path or where it lies relative to `checkpoint`."""
    record = checkpoint.manifest.base
    if record is None:
        return
    beside = None if record.relative is None else storage.join(checkpoint.path, record.relative)
    for path in (record.path, beside):
        if path is not None and storage.is_directory(path):
            checkpoint.base = open_source(path, weights_only=True)
            return
    raise CheckpointError(
        f"{checkpoint.path} holds adapters alone, and their base is no longer at {record.path}: put it back, "
        "or put both where they lie to each other as before."
    )


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
        return "distft"
    if LATEST_UNIVERSAL in names or "zero" in names:
        return "universal"
    if LATEST in names or any(MODEL_STATES.fullmatch(name) for name in names):
        return "deepspeed"
    weights = (".safetensors", ".safetensors.index.json", ".bin")
    has_weights = any(name.endswith(weights) and not name.startswith(ADAPTER_MODEL) for name in names)
    is_whole_model = CONFIG_FILE in names and has_weights
    if is_whole_model or ADAPTER_CONFIG in names:
        return "huggingface" if is_whole_model else "peft"
    if list_tags(path):
        return "deepspeed"  # without `latest`: its reader names the tags
    if CONFIG_FILE in names:
        return "huggingface"
    if looks_uncommitted(path, names):
        raise UnsupportedFormatError(
            f"{path} is uncommitted: its {MANIFEST} is missing, so it does not count."
            f"{sibling_steps_hint(path)}"
        )
    notes = [note for root in (path, storage.join(path, "checkpoints")) for note in uncommitted_notes(root)]
    raise UnsupportedFormatError(
        "\n".join(notes)
        or f"{path} is not a checkpoint of a known format. A distft checkpoint has {MANIFEST} or step_*/, a "
        f"DeepSpeed checkpoint {LATEST} or *_model_states.pt, a universal one {LATEST_UNIVERSAL}, a "
        f"transformers model {CONFIG_FILE}, and an adapter of PEFT {ADAPTER_CONFIG}. "
        f"It contains {', '.join(sorted(names)[:10])}."
    )
