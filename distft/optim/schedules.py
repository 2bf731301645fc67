"""Learning rate schedules: the multiple of the peak learning rate for each step.

Steps count from 0. During a warm-up of `w` steps the factor is `(step + 1) / w`: the first update is not
zero, and update `w - 1` has the peak. The decay ends at `final_factor` in the last of `total_steps` updates;
later updates keep it.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from distft.config import Component, Settings
from distft.errors import ConfigError

Factor = Annotated[float, Field(ge=0, le=1)]


class WarmupSettings(Settings):
    """Linear warm-up, common to all schedules."""

    warmup_steps: int = Field(0, ge=0)  # updates until the peak

    def check(self, total_steps: int) -> None:
        """Raise `ConfigError` if the schedule does not fit into `total_steps`."""
        if self.warmup_steps > total_steps:
            raise ConfigError(
                f"optim.schedule.warmup_steps={self.warmup_steps} is more than the {total_steps} steps of "
                f"the run, so it would never reach its peak learning rate: lower it, or train longer."
            )

    def _warmup(self, step: int) -> float:
        return min((step + 1) / self.warmup_steps, 1.0) if self.warmup_steps else 1.0

    def _decay_fraction(self, step: int, total_steps: int) -> float:
        """0 at the update with the peak, rising linearly to 1 at the last update."""
        return _fraction(step, max(self.warmup_steps - 1, 0), total_steps - 1)


def _fraction(step: int, start: int, end: int) -> float:
    """0 up to `start`, rising linearly to 1 at `end`."""
    if step <= start:
        return 0.0
    return min((step - start) / (end - start), 1.0) if end > start else 1.0


class ConstantConfig(WarmupSettings):
    """Stays at the peak."""

    type: Literal["constant"] = "constant"

    def factor(self, step: int, total_steps: int) -> float:  # noqa: ARG002
        """Multiple of the peak for update `step` of `total_steps`."""
        return self._warmup(step)


class LinearConfig(WarmupSettings):
    """Falls linearly from the peak to `final_factor`."""

    type: Literal["linear"] = "linear"
    final_factor: Factor = 0.0  # of the peak, in the last update

    def factor(self, step: int, total_steps: int) -> float:
        """Multiple of the peak for update `step` of `total_steps`."""
        if step < self.warmup_steps:
            return self._warmup(step)
        return 1.0 - (1.0 - self.final_factor) * self._decay_fraction(step, total_steps)


class CosineConfig(WarmupSettings):
    """Falls along half a cosine wave to `final_factor` (Loshchilov & Hutter, 2017)."""

    type: Literal["cosine"] = "cosine"
    final_factor: Factor = 0.1  # of the peak, in the last update

    def factor(self, step: int, total_steps: int) -> float:
        """Multiple of the peak for update `step` of `total_steps`."""
        if step < self.warmup_steps:
            return self._warmup(step)
        cosine = (1.0 + math.cos(math.pi * self._decay_fraction(step, total_steps))) / 2
        return self.final_factor + (1.0 - self.final_factor) * cosine


class WarmupStableDecayConfig(WarmupSettings):
    """Stays at the peak until the last `decay_steps`, so a longer run can resume where the decay began."""

    type: Literal["wsd"] = "wsd"
    decay_steps: int = Field(ge=1)  # length of the decay, at the end of the run
    decay_shape: Literal["linear", "sqrt"] = "linear"  # sqrt: 1 - sqrt(fraction), steep at first
    final_factor: Factor = 0.0  # of the peak, in the last update

    def factor(self, step: int, total_steps: int) -> float:
        """Multiple of the peak for update `step` of `total_steps`."""
        if step < self.warmup_steps:
            return self._warmup(step)
        fraction = _fraction(step, total_steps - 1 - self.decay_steps, total_steps - 1)
        if self.decay_shape == "sqrt":
            fraction = math.sqrt(fraction)
        return 1.0 - (1.0 - self.final_factor) * fraction

    def check(self, total_steps: int) -> None:
        super().check(total_steps)
        if self.warmup_steps + self.decay_steps > total_steps:
            raise ConfigError(
                f"optim.schedule.warmup_steps={self.warmup_steps} and optim.schedule.decay_steps="
                f"{self.decay_steps} add up to more than the {total_steps} steps of "
                f"the run: lower one of them, or train longer."
            )


class SlantedTriangularConfig(Settings):
    """Rises for a short, and falls for a long part of the steps (Howard & Ruder 2018, ULMFiT, P18-1031)."""

    type: Literal["slanted_triangular"] = "slanted_triangular"
    cut_fraction: float = Field(0.1, gt=0, lt=1)  # of the steps, in which it rises
    ratio: float = Field(32.0, ge=1)  # of the peak to the lowest

    def factor(self, step: int, total_steps: int) -> float:
        """Multiple of the peak for update `step` of `total_steps`."""
        cut = max(int(total_steps * self.cut_fraction), 1)
        fall = cut * (1 / self.cut_fraction - 1)
        share = step / cut if step < cut else max(1 - (step - cut) / fall, 0.0)
        return (1 + share * (self.ratio - 1)) / self.ratio

    def check(self, total_steps: int) -> None:
        """Every length of a run fits."""


class RangeConfig(Settings):
    """Rises exponentially to the peak in the last update: a range test (Smith 2017, arXiv:1506.01186)."""

    type: Literal["range"] = "range"
    first_factor: float = Field(1e-6, gt=0, lt=1)  # of the peak, in the first update

    def factor(self, step: int, total_steps: int) -> float:
        """Multiple of the peak for update `step` of `total_steps`."""
        return float(self.first_factor ** (1 - _fraction(step, 0, total_steps - 1)))

    def check(self, total_steps: int) -> None:
        """Raise `ConfigError` for a run that has nothing between its lowest and its highest rate."""
        if total_steps < 3:
            raise ConfigError(
                f"optim.schedule.type=range rises over the steps of the run, which are {total_steps}: train "
                "longer."
            )


ScheduleConfig = Annotated[
    CosineConfig
    | LinearConfig
    | ConstantConfig
    | WarmupStableDecayConfig
    | SlantedTriangularConfig
    | RangeConfig,
    Component(),
]
