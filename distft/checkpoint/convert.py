"""Convert a checkpoint to another format; the target becomes a checkpoint when its last file is written."""

from collections.abc import Callable, Iterable
from typing import Literal, Self, get_args

from pydantic import model_validator

from distft.checkpoint.damage import require_undamaged
from distft.checkpoint.formats.deepspeed_model import PARAM_DTYPES
from distft.checkpoint.formats.deepspeed_target import write_deepspeed
from distft.checkpoint.formats.huggingface_architecture import Architecture
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.formats.universal import write_universal
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.reshard import write_distft
from distft.checkpoint.sources import CheckpointSource
from distft.checkpoint.target import target_directory
from distft.config import Settings
from distft.optim.adamw import ADAMW_MOMENTS

Format = Literal["distft", "deepspeed", "universal", "huggingface"]
FORMATS: tuple[str, ...] = get_args(Format)
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)

# The settings that each format accepts.
_OPTIONS: dict[Format, tuple[str, ...]] = {
    "distft": ("ranks",),
    "deepspeed": ("ranks", "zero_stage", "dtype"),
    "universal": (),
    "huggingface": ("dtype", "architecture", "max_shard_bytes"),
}


class ConvertConfig(Settings):
    """Settings of a conversion. A setting that the format does not accept is an error."""

    to: Format
    ranks: int = 1  # deepspeed, distft: number of ranks to write files for
    zero_stage: int = 1  # deepspeed
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # of deepspeed's module, of huggingface's weights
    architecture: str | None = None  # huggingface; None: the first that fits
    max_shard_bytes: int = 5 << 30  # huggingface

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        unsupported = self.model_fields_set - {"to", *_OPTIONS[self.to]}
        if unsupported:
            # max_shard_bytes has no option on the command line.
            supported = _as_options(set(_OPTIONS[self.to]) - {"max_shard_bytes"}) or "no options"
            raise ValueError(
                f"{self.to} has no {_as_options(unsupported)}: leave that out; it accepts {supported}"
            )
        return self


def _as_options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def convert(
    source: CheckpointSource, target: str, config: ConvertConfig, on_progress: Callable[[int], None]
) -> list[str]:
    """Write `source` to the new directory `target`; returns notes on what the format cannot represent.

    Raises `CheckpointError` for a damaged source, and `ConfigError` if `target` is in use.
    """
    if config.to == "distft":
        write_distft(source, target, world_size=config.ranks, on_progress=on_progress)
        return []
    require_undamaged(source)
    with target_directory(target, source.path):
        if config.to == "universal":
            write_universal(source, target, on_progress=on_progress)
            return _notes_on_lost_states(source, config.to)
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
        return write_huggingface(
            source,
            target,
            dtype=None if config.dtype is None else PARAM_DTYPES[config.dtype],
            max_shard_bytes=config.max_shard_bytes,
            architecture=config.architecture,
            on_progress=on_progress,
        )


def _notes_on_lost_states(source: CheckpointSource, to: Format) -> list[str]:
    """A note if the source has states that only distft's own format can store."""
    states = {state for record in source.manifest.parameters.values() for state in record.states}
    lost = sorted(states - {WEIGHT, *ADAMW_MOMENTS})
    return [f"{', '.join(lost)} left out: the {to} format has no place for it."] if lost else []
