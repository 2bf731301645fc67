"""One checkpoint in another format. The source stays as it is; the target counts from its last file on."""

from collections.abc import Callable
from typing import Literal, Self, get_args

import torch
from pydantic import model_validator

from distft.checkpoint.comparison import check_whole
from distft.checkpoint.formats.deepspeed_target import write_deepspeed
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.formats.universal import write_universal
from distft.checkpoint.reshard import write_distft
from distft.checkpoint.sources import CheckpointSource
from distft.checkpoint.target import new_directory
from distft.config import Settings

Format = Literal["distft", "deepspeed", "universal", "huggingface"]
FORMATS: tuple[Format, ...] = get_args(Format)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        useless = sorted(self.model_fields_set - {"to", *_OPTIONS[self.to]})
        if useless:
            known = ", ".join(_OPTIONS[self.to]) or "no settings"
            raise ValueError(f"{self.to} has no {', '.join(useless)}: leave that out; it takes {known}")
        return self


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
            dtype=None if config.dtype is None else _DTYPES[config.dtype],
            max_shard_bytes=config.max_shard_bytes,
            architecture=config.architecture,
            on_progress=on_progress,
        )
