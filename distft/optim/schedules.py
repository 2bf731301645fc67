"""The learning rate as a function of the step, as a multiple of its peak.

Update `step` counts from 0 and is one of `total_steps`. Warm-up of `w` steps gives update `step` the factor
`(step + 1) / w`: the first update already moves, and update `w - 1` is at the peak. What follows ends at
`final_factor` in the last update, and stays there if more are run.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from distft.config import Part, Settings
from distft.errors import ConfigError

Factor = Annotated[float, Field(ge=0, le=1)]


class WarmupSettings(Settings):
    """What every schedule begins with."""

    warmup_steps: int = Field(0, ge=0)

    def check(self, total_steps: int) -> None:
        """Raise `ConfigError` where the schedule does not fit in a run of `total_steps`."""
        if self.warmup_steps > total_steps:
            raise ConfigError(
                f"optim.schedule.warmup_steps={self.warmup_steps} is more than the {total_steps} steps of "
                f"the run, which would never reach its learning rate: lower it, or train longer."
            )

    def _warmup(self, step: int) -> float:
        return min((step + 1) / self.warmup_steps, 1.0) if self.warmup_steps else 1.0

    def _progress(self, step: int, total_steps: int) -> float:
        """Share of the way from the update at the peak (0) to the last (1)."""
        return progress(step, max(self.warmup_steps - 1, 0), total_steps - 1)


def progress(step: int, start: int, end: int) -> float:
    """Where `step` is between `start` (0) and `end` (1), and not beyond."""
    if step <= start:
        return 0.0
    return min((step - start) / (end - start), 1.0) if end > start else 1.0


class ConstantConfig(WarmupSettings):
    """The peak all the way."""

    type: Literal["constant"] = "constant"

    def factor(self, step: int, total_steps: int) -> float:  # noqa: ARG002
        """Multiple of the peak for update `step` of `total_steps`."""
        return self._warmup(step)


class LinearConfig(WarmupSettings):
    """Down in a straight line."""

    type: Literal["linear"] = "linear"
    final_factor: Factor = 0.0  # of the peak, in the last update

    def factor(self, step: int, total_steps: int) -> float:
        """Multiple of the peak for update `step` of `total_steps`."""
        if step < self.warmup_steps:
            return self._warmup(step)
        return 1.0 - (1.0 - self.final_factor) * self._progress(step, total_steps)


class CosineConfig(WarmupSettings):
    """Down in half a wave of a cosine (Loshchilov & Hutter, 2017)."""

    type: Literal["cosine"] = "cosine"
    final_factor: Factor = 0.1  # of the peak, in the last update

    def factor(self, step: int, total_steps: int) -> float:
        """Multiple of the peak for update `step` of `total_steps`."""
        if step < self.warmup_steps:
            return self._warmup(step)
        height = (1.0 + math.cos(math.pi * self._progress(step, total_steps))) / 2
        return self.final_factor + (1.0 - self.final_factor) * height


class WarmupStableDecayConfig(WarmupSettings):
    """At the peak until the last `decay_steps`, so a longer run can take up from where the decay began."""

    type: Literal["wsd"] = "wsd"
    decay_steps: int = Field(ge=1)  # the last ones
    decay_shape: Literal["linear", "sqrt"] = "linear"  # "sqrt": 1 - sqrt(progress), steep at first
    final_factor: Factor = 0.0  # of the peak, in the last update

    def factor(self, step: int, total_steps: int) -> float:
        """Multiple of the peak for update `step` of `total_steps`."""
        if step < self.warmup_steps:
            return self._warmup(step)
        done = progress(step, total_steps - 1 - self.decay_steps, total_steps - 1)
        way = math.sqrt(done) if self.decay_shape == "sqrt" else done
        return 1.0 - (1.0 - self.final_factor) * way

    def check(self, total_steps: int) -> None:
        super().check(total_steps)
        if self.warmup_steps + self.decay_steps > total_steps:
            raise ConfigError(
                f"optim.schedule.warmup_steps={self.warmup_steps} and optim.schedule.decay_steps="
                f"{self.decay_steps} add up to more than the {total_steps} steps of "
                f"the run: lower one of them, or train longer."
            )


ScheduleConfig = Annotated[CosineConfig | LinearConfig | ConstantConfig | WarmupStableDecayConfig, Part()]
