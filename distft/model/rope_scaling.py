"""How rotary positions reach beyond the length that a model was pretrained on.

Each kind changes the inverse frequencies of the rotation, [R] for R pairs of elements, as transformers does.
"""

import math
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from distft.config import Component, Settings

if TYPE_CHECKING:  # a configuration is checked without torch
    from torch import Tensor

_Factor = Annotated[float, Field(ge=1, le=1e6)]  # the new length, in multiples of the original one
_Length = Annotated[int, Field(ge=1, le=(1 << 31) - 1)]


class LinearScaling(Settings):
    """All positions divided by `factor` (position interpolation, Chen et al. 2023, arXiv:2306.15595)."""

    type: Literal["linear"] = "linear"
    factor: _Factor

    @property
    def magnitude(self) -> float:
        return 1.0

    def scaled(self, frequencies_R: "Tensor", theta: float) -> "Tensor":  # noqa: ARG002
        return frequencies_R / self.factor


class NtkScaling(Settings):
    """A larger theta: the slowest pair is slowed down by `factor`, the fastest not at all.

    The factor holds for rows of any length. transformers' `dynamic` one grows with the row, so that a token's
    neighbours in a packed row and later tokens would change its rotation.
    """

    type: Literal["ntk"] = "ntk"
    factor: _Factor

    @property
    def magnitude(self) -> float:
        return 1.0

    def scaled(self, frequencies_R: "Tensor", theta: float) -> "Tensor":
        import torch

        size = 2 * len(frequencies_R)
        exponents_R = torch.arange(0, size, 2, device=frequencies_R.device, dtype=torch.float32) / size
        return 1.0 / self.theta(theta, size) ** exponents_R

    def theta(self, theta: float, head_dim: int) -> float:
        """The theta that gives the same rotation without scaling."""
        power: float = theta * self.factor ** (head_dim / (head_dim - 2))
        return power


class YarnScaling(Settings):
    """Slow pairs slowed down by `factor`, fast ones kept (YaRN: Peng et al. 2023, arXiv:2309.00071)."""

    type: Literal["yarn"] = "yarn"
    factor: _Factor
    original_max_seq_len: _Length  # tokens, of the pretraining
    beta_fast: float = Field(32.0, gt=0)  # rotations within that length from which a pair counts as fast
    beta_slow: float = Field(1.0, gt=0)  # and up to which it counts as slow
    attention_factor: float | None = Field(None, gt=0)  # of cos and sin; null: 0.1 * ln(factor) + 1
    truncate: bool = True  # the bounds of fast and slow to whole pairs

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast={self.beta_fast:g} is less than beta_slow={self.beta_slow:g}: fast pairs rotate "
                "more often than slow ones. Exchange them."
            )
        return self

    @property
    def magnitude(self) -> float:
        return yarn_magnitude(self.factor) if self.attention_factor is None else self.attention_factor

    def scaled(self, frequencies_R: "Tensor", theta: float) -> "Tensor":
        import torch

        num_pairs = len(frequencies_R)
        first, last = self._bounds(2 * num_pairs, theta)
        # Of each pair, the share of its frequency that stays; without a width the bounds would divide by 0.
        pairs_R = torch.arange(num_pairs, device=frequencies_R.device, dtype=torch.float32)
        stays_R = 1 - ((pairs_R - first) / ((last - first) or 0.001)).clamp(0, 1)
        return frequencies_R / self.factor * (1 - stays_R) + frequencies_R * stays_R

    def _bounds(self, head_dim: int, theta: float) -> tuple[float, float]:
        def pair_of(num_rotations: float) -> float:
            wavelengths = self.original_max_seq_len / (num_rotations * 2 * math.pi)
            return head_dim * math.log(wavelengths) / (2 * math.log(theta))

        first, last = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        return max(first, 0), min(last, head_dim - 1)


def yarn_magnitude(factor: float, coefficient: float = 1.0) -> float:
    """The factor of cos and sin that YaRN's authors fit: attention sharpens as rows grow."""
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


class Llama3Scaling(Settings):
    """Llama 3.1's: pairs with long wavelengths are slowed down by `factor`, a band below them partly."""

    type: Literal["llama3"] = "llama3"
    factor: _Factor
    original_max_seq_len: _Length  # tokens, of the pretraining
    low_freq_factor: float = Field(1.0, gt=0)  # wavelengths above original_max_seq_len / this are long
    high_freq_factor: float = Field(4.0, gt=0)  # and below original_max_seq_len / this are short

    @model_validator(mode="after")
    def _check_band(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor:g} is not more than low_freq_factor="
                f"{self.low_freq_factor:g}: raise it. Llama 3.1 has 4 and 1."
            )
        return self

    @property
    def magnitude(self) -> float:
        return 1.0

    def scaled(self, frequencies_R: "Tensor", theta: float) -> "Tensor":  # noqa: ARG002
        import torch

        low, high = self.low_freq_factor, self.high_freq_factor
        wavelengths_R = 2 * math.pi / frequencies_R
        slowed_R = frequencies_R / self.factor
        share_R = (self.original_max_seq_len / wavelengths_R - low) / (high - low)
        between_R = (1 - share_R) * slowed_R + share_R * frequencies_R
        is_long_R = wavelengths_R > self.original_max_seq_len / low
        is_short_R = wavelengths_R < self.original_max_seq_len / high
        return torch.where(is_long_R, slowed_R, torch.where(is_short_R, frequencies_R, between_R))


RopeScaling: TypeAlias = Annotated[LinearScaling | NtkScaling | YarnScaling | Llama3Scaling, Component()]
