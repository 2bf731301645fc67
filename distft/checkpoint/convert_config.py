"""Settings of a conversion between checkpoint formats. Checked without torch."""

from collections.abc import Iterable
from typing import Literal, Self, get_args

from pydantic import model_validator

from distft.checkpoint.formats.huggingface_config import Architecture
from distft.config import Settings

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
Format = Literal["distft", "deepspeed", "universal", "huggingface", "peft"]
FORMATS: tuple[str, ...] = get_args(Format)
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)

# The settings that each format accepts.
_OPTIONS: dict[Format, tuple[str, ...]] = {
    "distft": ("ranks",),
    "deepspeed": ("ranks", "zero_stage", "dtype"),
    "universal": (),
    "huggingface": ("dtype", "architecture", "max_shard_bytes"),
    "peft": ("architecture",),
}


class ConvertConfig(Settings):
    """Settings of a conversion. A setting that the format does not accept is an error."""

    to: Format
    ranks: int = 1  # deepspeed, distft: number of ranks to write files for
    zero_stage: int = 1  # deepspeed
    dtype: Precision | None = None  # of deepspeed's module, of huggingface's weights
    architecture: str | None = None  # huggingface, peft; None: the first that fits
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


class ParameterGroups(Settings):
    """The file of `--parameter-groups`: names for parameters that DeepSpeed's stage 0 only numbers."""

    groups: tuple[tuple[str, ...], ...]  # of each optimizer group, in the script's order


def _as_options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))
