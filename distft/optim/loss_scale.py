"""Dynamic loss scale for fp16: as high as overflow allows, so that small gradients do not underflow."""

from pydantic import Field

from distft.config import Settings


class LossScaleConfig(Settings):
    """How the fp16 loss scale grows and shrinks."""

    initial_scale: float = Field(2.0**16, ge=1)
    growth_steps: int = Field(1000, ge=1)  # consecutive updates without overflow until the scale doubles
    hysteresis: int = Field(2, ge=1)  # overflows since the last growth until the scale starts to halve
    min_scale: float = Field(1.0, gt=0)

    def build(self) -> "DynamicLossScale":
        return DynamicLossScale(self)


class DynamicLossScale:
    """Halves after overflows, doubles after `growth_steps` without one. All ranks must record the same."""

    def __init__(self, settings: LossScaleConfig) -> None:
        self._settings = settings
        self.scale = settings.initial_scale
        self._good_steps = 0  # consecutive updates without overflow
        self._tolerance = settings.hysteresis  # overflows left, including the one that halves the scale

    def update(self, *, is_overflow: bool) -> None:
        """Record one optimizer step; `is_overflow` if its gradients were not finite."""
        if is_overflow:
            self._good_steps = 0
            self._tolerance = max(self._tolerance - 1, 0)
            if self._tolerance == 0:
                self.scale = max(self.scale / 2, self._settings.min_scale)
            return
        self._good_steps += 1
        if self._good_steps == self._settings.growth_steps:
            self._good_steps = 0
            self._tolerance = self._settings.hysteresis
            self.scale *= 2

    def state_dict(self) -> dict[str, float]:
        """Everything that a resume needs, as plain numbers."""
        return {"scale": self.scale, "good_steps": self._good_steps, "tolerance": self._tolerance}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from an earlier `state_dict`."""
        self.scale = float(state["scale"])
        self._good_steps = int(state["good_steps"])
        self._tolerance = int(state["tolerance"])
