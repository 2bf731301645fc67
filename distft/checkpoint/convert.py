"""Convert a checkpoint to another format; the target becomes a checkpoint when its last file is written."""

from collections.abc import Callable

from distft.checkpoint.adapters import merged
from distft.checkpoint.convert_config import ConvertConfig, Format
from distft.checkpoint.damage import require_undamaged
from distft.checkpoint.formats.deepspeed.model import PARAM_DTYPES
from distft.checkpoint.formats.deepspeed.transformers_model import TransformersCheckpoint
from distft.checkpoint.formats.deepspeed.universal import write_universal
from distft.checkpoint.formats.deepspeed.writer import write_deepspeed
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.formats.peft_target import write_peft
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.mup import require_standard
from distft.checkpoint.reshard import write_distft
from distft.checkpoint.sources import CheckpointSource
from distft.checkpoint.target import target_directory
from distft.optim.adamw import ADAMW_MOMENTS


def convert(
    source: CheckpointSource,
    target: str,
    config: ConvertConfig,
    on_progress: Callable[[int], None],
    on_note: Callable[[str], None] | None = None,
) -> list[str]:
    """Write `source` to the new directory `target`; returns notes on what the format cannot represent.

    For transformers, `on_note` gets them before the work; then they are not returned.

    Raises `CheckpointError` for a damaged source, and `ConfigError` if `target` is in use.
    """
    if config.to == "distft":
        write_distft(source, target, world_size=config.ranks, on_progress=on_progress)
        return []
    require_undamaged(source)
    with target_directory(target, source.path):
        if isinstance(source, TransformersCheckpoint) and config.to != "huggingface":
            source = source.deepspeed  # under its own names, which the script that goes on has
        if config.to == "universal":
            write_universal(source, target, on_progress=on_progress)
            return [*_notes_on_lost_states(source, config.to), *_notes_on_universal(source)]
        if config.to == "deepspeed":
            write_deepspeed(
                source,
                target,
                zero_stage=config.zero_stage,
                world_size=config.ranks,
                param_dtype=config.dtype or source.manifest.written_by.get("param_dtype") or "fp32",
                tag=f"global_step{source.manifest.progress.step}",
                on_progress=on_progress,
            )
            return _notes_on_lost_states(source, config.to)
        if config.to == "peft":
            require_standard(source, "PEFT")
            return write_peft(source, target, architecture=config.architecture, on_progress=on_progress)
        notes = write_huggingface(
            merged(source),
            target,
            dtype=None if config.dtype is None else PARAM_DTYPES[config.dtype],
            max_shard_bytes=config.max_shard_bytes,
            architecture=config.architecture,
            on_progress=on_progress,
            on_note=on_note,
        )
        return notes if on_note is None else []


def _notes_on_universal(source: CheckpointSource) -> list[str]:
    """What DeepSpeed's own loader does not take from a universal checkpoint that has it."""
    records = source.manifest.parameters
    frozen = [name for name, record in records.items() if not record.trainable]
    notes = []
    if frozen:
        notes.append(
            f"{len(frozen)} frozen weights and buffers, such as {frozen[0]}, were written, but DeepSpeed "
            "does not load them from a universal checkpoint: give the script their values otherwise."
        )
    if len(source.manifest.groups) > 1:
        notes.append(
            f"Of the {len(source.manifest.groups)} parameter groups, DeepSpeed at stage 3 loads the settings "
            "and the update count of the first into all of them."
        )
    return notes


def _notes_on_lost_states(source: CheckpointSource, to: Format) -> list[str]:
    """A note if the source has states that only distft's own format can store."""
    states = {state for record in source.manifest.parameters.values() for state in record.states}
    lost = sorted(states - {WEIGHT, *ADAMW_MOMENTS})
    return [f"{', '.join(lost)} left out: the {to} format has no place for it."] if lost else []
