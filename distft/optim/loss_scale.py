"""Dynamic loss scale for fp16: as high as overflow allows, so that small gradients do not underflow."""

import torch
from pydantic import Field
from torch import Tensor

from distft.config import Settings

_CPU = torch.device("cpu")


class LossScaleConfig(Settings):
    """How the fp16 loss scale grows and shrinks."""

    initial_scale: float = Field(2.0**16, ge=1)
    growth_steps: int = Field(1000, ge=1)  # consecutive updates without overflow until the scale doubles
    hysteresis: int = Field(2, ge=1)  # overflows since the last growth until the scale starts to halve
    min_scale: float = Field(1.0, gt=0)

    def build(self, device: torch.device = _CPU) -> "DynamicLossScale":
        return DynamicLossScale(self, device)


class DynamicLossScale:
    """Halves after overflows, doubles after `growth_steps` without one. All ranks must record the same.

    Scale and counters stay on the device, so that an update waits for nothing; `state_dict` waits.
    """

    def __init__(self, settings: LossScaleConfig, device: torch.device = _CPU) -> None:
        self._settings = settings
        self._device = device
        # `update` replaces these three tensors and never changes one: whoever holds one has its old value.
        self.scale = torch.full((), settings.initial_scale, device=device)  # float32
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)  # in a row, without overflow
        # Overflows left, including the one that halves the scale.
        self._tolerance = torch.full((), settings.hysteresis, dtype=torch.int64, device=device)

    def update(self, *, is_overflow: Tensor | bool) -> None:
        """Record one optimizer step; `is_overflow`, a scalar on the device: its gradients were not finite."""
        overflow = torch.as_tensor(is_overflow).to(device=self._device, dtype=torch.int64)
        good_steps = (self._good_steps + 1) * (1 - overflow)
        tolerance = (self._tolerance - overflow).clamp(min=0)
        halves = overflow.bool() & (tolerance == 0)
        is_complete = good_steps == self._settings.growth_steps
        # As torch's GradScaler, it does not grow beyond what fp32 holds.
        grows = is_complete & torch.isfinite(self.scale * 2)
        halved = (self.scale / 2).clamp(min=self._settings.min_scale)
        self.scale = torch.where(halves, halved, torch.where(grows, self.scale * 2, self.scale))
        self._good_steps = good_steps.masked_fill(is_complete, 0)
        self._tolerance = tolerance.masked_fill(is_complete, self._settings.hysteresis)

    def state_dict(self) -> dict[str, float]:
        """Everything that a resume needs, as plain numbers."""
        return {
            "scale": float(self.scale),
            "good_steps": int(self._good_steps),
            "tolerance": int(self._tolerance),
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from an earlier `state_dict`."""
        self.scale = torch.full_like(self.scale, float(state["scale"]))
        self._good_steps = torch.full_like(self._good_steps, int(state["good_steps"]))
        self._tolerance = torch.full_like(self._tolerance, int(state["tolerance"]))
