"""Which metric of a run a search compares, whether less of it is better, and its values so far."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from distft.errors import ConfigError, suggest_name
from distft.search.settings import ConstraintConfig
from distft.train.early_stopping import is_less_better

VALIDATION = "validation/"  # begins the names of metrics of held-out data
_NOT_A_METRIC = ("step", "time")


def main_metric(names: Sequence[str], stopping: Any = None) -> str:
    """Of the names that a run has logged, the one that tells how good it is.

    That of early stopping (`stopping` is that section, as it stands in the settings); else the validation's
    accuracy or its like, of language models the loss.
    """
    if isinstance(stopping, Mapping) and f"{VALIDATION}{stopping.get('metric')}" in names:
        return f"{VALIDATION}{stopping['metric']}"
    held_out = [name for name in names if name.startswith(VALIDATION)]
    if f"{VALIDATION}perplexity" in held_out:
        return f"{VALIDATION}loss"
    rising = [name for name in held_out if name.endswith(("accuracy", "spearman", "micro_f1"))]
    return next(iter(rising or held_out), "loss")


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def metric_names(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of all numbers in lines of metrics, in the order of their first line."""
    names = {name: None for line in lines for name, value in line.items() if is_number(value)}
    return [name for name in names if name not in _NOT_A_METRIC]


def require_metric(metric: str, names: Sequence[str], setting: str = "search.metric") -> None:
    """Raise `ConfigError` if no run reports it."""
    if metric not in names:
        raise ConfigError(
            f"{setting}={metric}: no run reports it.{suggest_name(metric, names)} "
            f"There are: {', '.join(names) or 'none'}."
        )


def sign_of(metric: str, mode: str = "auto") -> int:
    """1 if more of it is better, -1 if less; `mode` as for `SearchConfig`."""
    less = is_less_better(metric) if mode == "auto" else mode == "min"
    return -1 if less else 1


def final_value(values: Sequence[float | None], sign: int, *, best: bool) -> float | None:
    """What a run counts for: its last value, or the best finite one; None: it is not finite, or not there."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if best:
        return max(finite, key=lambda value: sign * value, default=None)
    last = values[-1] if values else None
    return last if last is not None and math.isfinite(last) else None


@dataclass(slots=True)
class MetricSeries:
    """What the lines of one run say of the metrics that a search looks at."""

    metric: str | None  # None: the main one of the first evaluation
    stopping: Any = None  # the section train.early_stopping of the run's settings
    others: tuple[str, ...] = ()  # shown beside it
    constraints: tuple[ConstraintConfig, ...] = ()
    history: list[tuple[int, float]] = field(default_factory=list)  # step, value
    latest: dict[str, float] = field(default_factory=dict)  # of every name
    step: int = 0  # the last one that was logged
    _extremes: dict[tuple[str, bool], float] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> bool:
        """Take note of a line; whether it has a new value of the metric. Lines that were seen count once."""
        step = line.get("step")
        if not is_number(step):
            return False
        numbers = {  # null is what a run writes for NaN and infinity
            name: math.nan if value is None else float(value)
            for name, value in line.items()
            if (value is None or is_number(value)) and name not in _NOT_A_METRIC
        }
        if self.metric is None and any(name.startswith(VALIDATION) for name in numbers):
            self.metric = main_metric(list(numbers), self.stopping)
        self.step = max(self.step, int(step))
        self.latest |= numbers
        for constraint in self.constraints:
            if constraint.metric in numbers:
                self._note_extreme(constraint, numbers[constraint.metric])
        is_new = self.metric in numbers and (not self.history or step > self.history[-1][0])
        if is_new and self.metric is not None:
            self.history.append((int(step), numbers[self.metric]))
        return is_new

    def _note_extreme(self, constraint: ConstraintConfig, value: float) -> None:
        """Of a validation metric the last value counts; of the others the worst, such as a peak of memory."""
        for is_max, bound in ((True, constraint.max), (False, constraint.min)):
            if bound is not None:
                key = (constraint.metric, is_max)
                before = self._extremes.get(key, value)
                is_last = constraint.metric.startswith(VALIDATION)
                worse = max(before, value) if is_max else min(before, value)
                self._extremes[key] = value if is_last or math.isnan(value) else worse

    @property
    def shown(self) -> dict[str, float]:
        """The last values of the other metrics."""
        return {name: self.latest[name] for name in self.others if name in self.latest}

    @property
    def violations(self) -> list[str]:
        """In words, each constraint that does not hold."""
        found = []
        for constraint in self.constraints:
            for is_max, bound in ((True, constraint.max), (False, constraint.min)):
                value = self._extremes.get((constraint.metric, is_max))
                if bound is None or value is None:
                    continue
                if not (value <= bound if is_max else value >= bound):
                    word = "more" if is_max else "less"
                    found.append(f"{constraint.metric} {value:.6g} is {word} than {bound:.6g}")
        return found

    def require_known(self) -> None:
        """After an evaluation: raise `ConfigError` for names that the run does not report."""
        names = list(self.latest)
        if self.metric is not None:
            require_metric(self.metric, names)
        for name in self.others:
            require_metric(name, names, "search.metrics")
        for constraint in self.constraints:
            require_metric(constraint.metric, names, "search.constraints.metric")
