"""Settings that all engines share, and those of the local engine. Parsed without torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from distft.config import Settings

Precision = Literal["fp32", "bf16", "fp16"]

# What the backward recomputes to save memory: nothing, all but products and attention, or whole blocks.
ActivationCheckpointing = Literal["none", "selective", "full"]


def _from_bool(value: Any) -> Any:
    """Until format version 2 the setting was a boolean, and so it is in older files."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class EngineSettings(Settings):
    """Settings common to all engines."""

    param_dtype: Precision = "fp32"  # of weights and activations; updates are fp32
    # Bits of frozen matrices of blocks: 8, or NF4 (Dettmers et al. 2023, arXiv:2305.14314); null: param_dtype
    frozen_bits: Literal[8, 4] | None = None
    activation_checkpointing: Annotated[ActivationCheckpointing, BeforeValidator(_from_bool)] = "none"
    compile: bool | Literal["auto"] = "auto"  # torch.compile each block: slower to start, then faster
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"  # scaling of FP8 matrix products
    fp8_min_features: int = Field(default=1024, ge=16)  # smaller linear layers multiply in param_dtype
    allow_tf32: bool = False  # on a GPU, multiply fp32 matrices with 10 bits of mantissa: faster

    @model_validator(mode="after")
    def _check_fp8(self) -> Self:
        if self.fp8 != "none" and self.param_dtype != "bf16":
            raise ValueError(f"fp8={self.fp8} needs param_dtype: bf16, not {self.param_dtype}")
        if self.fp8 != "none" and self.frozen_bits is not None:
            raise ValueError(f"fp8={self.fp8} and frozen_bits={self.frozen_bits}: set one of them")
        return self


class LocalConfig(EngineSettings):
    """Plain torch in a single process."""

    type: Literal["local"] = "local"
