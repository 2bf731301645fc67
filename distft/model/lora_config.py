"""Settings of low-rank adapters beside linear layers: LoRA, rsLoRA and DoRA. Checked without torch."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from distft.config import Settings

A, B, MAGNITUDE = "lora_a", "lora_b", "lora_magnitude"  # last parts of the names of an adapter's parameters
_MOST_RANK = 1 << 16
# What an adapter's weights mean depends on these; the others affect training and files alone.
_MEANING = ("rank", "alpha", "rslora", "dora", "targets")


def _default_alpha(data: Mapping[str, Any]) -> float:
    return 2.0 * float(data.get("rank", 1))


class LoraConfig(Settings):
    """Adapters (LoRA: Hu et al. 2021, arXiv:2106.09685): y = W x + scale * B A x; only A and B train."""

    rank: int = Field(ge=1, le=_MOST_RANK)  # rows of A and columns of B
    alpha: float = Field(default_factory=_default_alpha, gt=0)  # scale * rank; default: 2 * rank
    rslora: bool = False  # scale = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)
    dora: bool = False  # with a trained magnitude for each row of W + B A (Liu et al. 2024, arXiv:2402.09353)
    dropout: float = Field(0.0, ge=0, lt=1)  # of the adapters' inputs
    # Patterns of names of linear layers, whole or from a dot on: q, attn.*, blocks.3.*; "!pattern" excludes.
    targets: tuple[str, ...] = Field(("*",), min_length=1)
    copies_base: bool = False  # checkpoints hold what they would otherwise read from init_from

    @property
    def scale(self) -> float:
        """The factor of B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def differences(self, other: "LoraConfig") -> list[str]:
        """Names of the settings by which weights of `other` mean something else here."""
        return [name for name in _MEANING if getattr(self, name) != getattr(other, name)]


def is_adapter(parameter: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return parameter.rpartition(".")[2] in {A, B, MAGNITUDE}
