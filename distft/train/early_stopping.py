"""Early stopping: whether a metric of the validation data still improves."""

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from distft.checkpoint.manifest import BestMetric, Progress
from distft.config import Settings
from distft.errors import ConfigError, suggest_name

# What a metric's name, or its part behind the last slash, ends with if less of it is better.
_LESS_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "error")


class EarlyStoppingConfig(Settings):
    """When validation counts as no longer improving, as in Keras' EarlyStopping."""

    metric: str = "loss"  # of the validation data, without `validation/`; of a mixture: <part>/<metric>
    patience: int = Field(3, ge=1)  # evaluations in a row without an improvement
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False)  # a smaller change is no improvement
    mode: Literal["auto", "min", "max"] = "auto"  # auto: min for losses, errors and perplexities

    @property
    def direction(self) -> Literal["min", "max"]:
        """Whether less or more of the metric is better."""
        if self.mode == "auto":
            return "min" if is_less_better(self.metric) else "max"
        return self.mode

    def require_metric(self, metrics: Mapping[str, float | int], setting: str) -> None:
        """Raise `ConfigError` if the evaluation does not report the metric."""
        if self.metric not in metrics:
            known = sorted(metrics)
            raise ConfigError(
                f"{setting}.metric={self.metric} is no metric of the validation data."
                f"{suggest_name(self.metric, known)} These are: {', '.join(known)}."
            )


def is_less_better(metric: str) -> bool:
    """Whether a metric of this name is best if low: a loss, an error, a perplexity."""
    return metric.endswith(_LESS_IS_BETTER)


def next_best(config: EarlyStoppingConfig, best: BestMetric | None, value: float, step: int) -> BestMetric:
    """The best value so far, after an evaluation at `step`. NaN and infinity are never an improvement."""
    new = BestMetric(metric=config.metric, mode=config.direction, value=value, step=step)
    if best is None:
        return new if math.isfinite(value) else new.model_copy(update={"value": None})
    if math.isfinite(value):
        if best.value is None:
            return new
        gain = best.value - value if config.direction == "min" else value - best.value
        if gain > config.min_delta:
            return new
    return best.model_copy(update={"evaluations_since": best.evaluations_since + 1})


def known_best(config: EarlyStoppingConfig | None, saved: BestMetric | None) -> BestMetric | None:
    """`saved`, if it is of the metric that decides now."""
    if config is None or saved is None:
        return None
    is_same = (saved.metric, saved.mode) == (config.metric, config.direction)
    return saved if is_same else None


def has_stalled(config: EarlyStoppingConfig | None, saved: BestMetric | None) -> bool:
    """Whether the last `patience` evaluations brought no improvement."""
    best = known_best(config, saved)
    return config is not None and best is not None and best.evaluations_since >= config.patience


class EarlyStopping:
    """Follows the validation metrics, and says whether this part of the run is over.

    What it remembers is saved with the run. It reads metrics that are equal on all ranks.
    """

    def __init__(
        self,
        progress: Progress,
        *,
        of_run: EarlyStoppingConfig | None = None,
        of_phase: EarlyStoppingConfig | None = None,
        phase_starts: tuple[int, ...] = (),
        phase_stop: int | None = None,
    ) -> None:
        """`phase_starts` of the phases up to this one, which ends at `phase_stop`; empty: the only one."""
        self._of_run = of_run
        self._of_phase = of_phase
        self._starts = phase_starts
        self._phase_stop = phase_stop
        self.best_of_run = known_best(of_run, progress.best_of_run)
        self.best_of_phase = known_best(of_phase, progress.best_of_phase)

    @property
    def is_needed(self) -> bool:
        """Whether evaluations decide anything."""
        return self._of_run is not None or self._of_phase is not None

    def require_metrics(self, metrics: Mapping[str, float | int]) -> None:
        """Raise `ConfigError` if evaluations do not report what decides."""
        if self._of_run is not None:
            self._of_run.require_metric(metrics, "train.early_stopping")
        if self._of_phase is not None:
            self._of_phase.require_metric(metrics, f"phases.{len(self._starts) - 1}.until_stalled")

    def add(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Take note of an evaluation, which has what `require_metrics` asks for."""
        if self._of_run is not None:
            value = metrics[self._of_run.metric]
            self.best_of_run = next_best(self._of_run, self.best_of_run, value, step)
        if self._of_phase is not None:
            value = metrics[self._of_phase.metric]
            self.best_of_phase = next_best(self._of_phase, self.best_of_phase, value, step)

    def is_best(self, step: int) -> bool:
        """Whether the evaluation of this step was the run's best, which is saved."""
        best = self.best_of_run
        return best is not None and best.value is not None and best.step == step

    @property
    def is_run_stalled(self) -> bool:
        return has_stalled(self._of_run, self.best_of_run)

    def is_phase_over(self, step: int) -> bool:
        """Whether the phase ends after this step; the run may end before."""
        return step == self._phase_stop or has_stalled(self._of_phase, self.best_of_phase)

    def phase_starts(self, step: int) -> tuple[int, ...]:
        """The start of each phase, of which one may begin after this step."""
        begins = bool(self._starts) and self.is_phase_over(step) and not self.is_run_stalled
        return (*self._starts, step) if begins else self._starts
