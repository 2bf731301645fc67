"""One checkpoint in another format. The source stays as it is; the target counts from its last file on."""

from collections.abc import Callable, Iterable
from typing import Literal, Self, get_args

from pydantic import model_validator

from distft.checkpoint.comparison import check_whole
from distft.checkpoint.formats.deepspeed_model import PARAM_DTYPES
from distft.checkpoint.formats.deepspeed_target import write_deepspeed
from distft.checkpoint.formats.huggingface_shape import Architecture
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.formats.universal import write_universal
from distft.checkpoint.reshard import write_distft
from distft.checkpoint.sources import CheckpointSource
from distft.checkpoint.target import new_directory
from distft.config import Settings

Format = Literal["distft", "deepspeed", "universal", "huggingface"]
FORMATS: tuple[str, ...] = get_args(Format)
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)

# What only some formats have a use for.
_OPTIONS: dict[Format, tuple[str, ...]] = {
    "distft": ("ranks",),
    "deepspeed": ("ranks", "zero_stage", "dtype"),
    "universal": (),
    "huggingface": ("dtype", "architecture", "max_shard_bytes"),
}


class ConvertConfig(Settings):
    """What a conversion makes; a setting that the format has no use for is a mistake."""

    to: Format
    ranks: int = 1  # deepspeed, distft: number of ranks whose files are written
    zero_stage: int = 1  # deepspeed
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # deepspeed: of its module; huggingface: of all
    architecture: str | None = None  # huggingface; None: the first that fits
    max_shard_bytes: int = 5 << 30  # huggingface

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        useless = self.model_fields_set - {"to", *_OPTIONS[self.to]}
        if useless:
            # The command line does not offer all of them.
            known = _as_options(set(_OPTIONS[self.to]) - {"max_shard_bytes"}) or "no options"
            raise ValueError(f"{self.to} has no {_as_options(useless)}: leave that out; it takes {known}")
        return self


def _as_options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


def convert(
    source: CheckpointSource, target: str, config: ConvertConfig, on_progress: Callable[[int], None]
) -> list[str]:
    """Write `source` to the new directory `target`; returns notes on what could not be carried over."""
    if config.to == "distft":
        write_distft(source, target, world_size=config.ranks, on_progress=on_progress)
        return []
    check_whole(source)
    with new_directory(target, source.path):
        if config.to == "universal":
            write_universal(source, target, on_progress=on_progress)
            return []
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
            return []
        return write_huggingface(
            source,
            target,
            dtype=None if config.dtype is None else PARAM_DTYPES[config.dtype],
            max_shard_bytes=config.max_shard_bytes,
            architecture=config.architecture,
            on_progress=on_progress,
        )
