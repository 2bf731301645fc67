"""The loss scale of fp16: as high as gradients allow, so that small ones do not vanish."""

from pydantic import Field

from distft.config import Settings


class LossScaleConfig(Settings):
    """How the scale of fp16 losses moves."""

    initial_scale: float = Field(2.0**16, ge=1)
    growth_steps: int = Field(1000, ge=1)  # updates in a row without overflow until the scale doubles
    hysteresis: int = Field(2, ge=1)  # overflows since the last growth until the scale begins to halve
    min_scale: float = Field(1.0, gt=0)

    def build(self) -> "DynamicLossScale":
        return DynamicLossScale(self)


class DynamicLossScale:
    """Halves after overflows, doubles after a long time without one. Every rank must be told the same."""

    def __init__(self, settings: LossScaleConfig) -> None:
        self._settings = settings
        self.scale = settings.initial_scale
        self._good_steps = 0  # in a row
        self._tolerance = settings.hysteresis  # overflows up to the one that halves

    def update(self, *, is_overflow: bool) -> None:
        """Take note of one optimizer step: whether its gradients were finite."""
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
        """All that a resume needs, as plain numbers."""
        return {"scale": self.scale, "good_steps": self._good_steps, "tolerance": self._tolerance}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict` of an earlier run."""
        self.scale = float(state["scale"])
        self._good_steps = int(state["good_steps"])
        self._tolerance = int(state["tolerance"])
