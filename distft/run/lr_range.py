"""The range test of the learning rate, which rises until the loss diverges (Smith 2017, arXiv:1506.01186)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.config import apply_overrides, load_yaml
from distft.errors import ConfigError, DivergedError, Preempted
from distft.run.config import SEARCH_SECTION, RunConfig, parse_run_config
from distft.run.paths import CONFIG_FILE
from distft.topology import Topology
from distft.tracker import METRICS_FILE
from distft.tracker.growing_lines import GrowingLines
from distft.train.services import StopReason

_SMOOTHED_SHARE = 0.02  # of all steps: the standard deviation of the window that smooths losses
_FIRST_STEPS = 5  # whose mean is the loss at the start
_LIVE_STEPS = 5  # whose mean tells whether a run has diverged
_DIVERGED = 1.25  # times the loss at the start,
_DIVERGED_FROM_BEST = 2.0  # and times the lowest


@dataclass(frozen=True, kw_only=True, slots=True)
class LrRange:
    """Losses by rate, up to where the loss diverged or the range ended."""

    directory: str  # of the run
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    has_diverged: bool
    steepest: float | None  # the rate at which the smoothed loss fell fastest; None: it never fell
    tenth_of_minimum: float | None  # a tenth of the rate with the lowest smoothed loss: the suggestion


def run_lr_range(
    config_path: str,
    overrides: Sequence[str] = (),
    *,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 150,
    directory: str | None = None,
    topology: Topology | None = None,
) -> LrRange:
    """Train the configuration for up to `steps` steps at rates from `lowest` to `highest`, on this rank.

    It is a run of its own in `directory` (None: the run_dir with `_lr_range` behind it), without validation,
    trackers and phases; the same call goes on with it. Raises `ConfigError` if another run is there.
    """
    config = range_config(
        config_path, overrides, lowest=lowest, highest=highest, steps=steps, directory=directory
    )
    _require_own_directory(config)
    metrics = GrowingLines(Path(config.run_dir) / METRICS_FILE)
    diverged = _has_diverged(_losses(metrics))
    if not diverged:
        diverged = _train(config, topology or Topology(), metrics)
    lines = _lines(metrics)
    return found_range(
        [line["lr"] for line in lines],
        [_loss(line) for line in lines],
        directory=config.run_dir,
        has_diverged=diverged,
    )


def _train(config: RunConfig, topology: Topology, metrics: GrowingLines) -> bool:
    """Train to the end of the range; returns whether the loss diverged before, which ends the run."""
    from distft.run.train import run_training  # torch, which a wrong setting need not wait for

    def stop_requested() -> StopReason | None:
        return "requested" if topology.is_main and _has_diverged(_losses(metrics)) else None

    try:
        run_training(config, topology, stop_requested)
    except DivergedError:
        return True
    except Preempted:  # as the loss diverged, or on a signal
        if not _has_diverged(_losses(metrics)):
            raise
        return True
    return _has_diverged(_losses(metrics))


def range_config(
    config_path: str,
    overrides: Sequence[str],
    *,
    lowest: float,
    highest: float,
    steps: int,
    directory: str | None,
) -> RunConfig:
    """The run of the test. Raises one `ConfigError` with all that is wrong."""
    problems = []
    if not (0 < lowest < highest < math.inf):
        problems.append(
            f"The rates go from {lowest:g} to {highest:g}: give two above 0, the lower one first."
        )
    if steps < 10:
        problems.append(f"{steps} steps are too few to see a curve: give 10 or more.")
    own = _settings(config_path, overrides)
    if own.phases:
        problems.append(
            "The configuration has phases, each with rates of its own: leave them out, phases=[]."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return _settings(
        config_path,
        [
            *overrides,
            f"run_dir={directory or f'{own.run_dir}_lr_range'}",
            f"optim.peak_lr={highest!r}",
            f"optim.schedule={{type: range, first_factor: {lowest / highest!r}}}",
            "train.num_epochs=null",
            f"train.max_steps={steps}",
            "train.log_every_steps=1",
            "train.early_stopping=null",
            "train.max_skipped_share=1",
            "validation=null",
            "evaluation={}",
            "checkpoint={}",
            "trackers=[]",
            "compare_with_supervised=false",
        ],
    )


def _settings(config_path: str, overrides: Sequence[str]) -> RunConfig:
    """Those of a run; of a search, whose configuration may be given, those that its runs share."""
    raw = apply_overrides(load_yaml(config_path), overrides)
    return parse_run_config({name: value for name, value in raw.items() if name != SEARCH_SECTION})


def _require_own_directory(config: RunConfig) -> None:
    """Raise `ConfigError` unless the directory is empty, or has this very run."""
    path = Path(config.run_dir)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    settings = path / CONFIG_FILE
    saved, own = load_yaml(settings) if settings.is_file() else {}, config.model_dump(mode="json")
    # A resume allows other rates, lengths and batches, and refuses other models and data by itself.
    if all(saved.get(name) == own[name] for name in ("optim", "train", "batch")):
        return
    raise ConfigError(
        f"{path} exists, and what is there is not this range test: name another directory, or move it away."
    )


def _lines(metrics: GrowingLines) -> list[dict[str, Any]]:
    lines = {line["step"]: line for line in metrics.read() if "loss" in line and "lr" in line}
    return [lines[step] for step in sorted(lines)]  # of steps that were done again, the last one


def _losses(metrics: GrowingLines) -> list[float]:
    return [_loss(line) for line in _lines(metrics)]


def _loss(line: dict[str, Any]) -> float:
    """JSON has no number for a loss that is not finite."""
    return float(line["loss"]) if isinstance(line["loss"], int | float) else math.inf


def _has_diverged(losses: Sequence[float]) -> bool:
    """Whether the last losses are not finite, or far above those at the start and the lowest."""
    if len(losses) < _FIRST_STEPS + _LIVE_STEPS:
        return False
    means = [sum(losses[i : i + _LIVE_STEPS]) / _LIVE_STEPS for i in range(len(losses) - _LIVE_STEPS + 1)]
    limit = max(_DIVERGED * means[0], _DIVERGED_FROM_BEST * min(means))
    return not means[-1] <= limit


def found_range(
    rates: Sequence[float], losses: Sequence[float], *, directory: str, has_diverged: bool
) -> LrRange:
    """The smoothed losses and what they suggest, of one loss for each rate, in ascending order."""
    count = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    rates, losses = tuple(rates[:count]), tuple(losses[:count])
    smoothed = smooth(losses, max(_SMOOTHED_SHARE * len(losses), 1.0))
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__, default=0)
    falls = [smoothed[i + 1] - smoothed[i - 1] for i in range(1, lowest)]
    has_fallen = lowest > 0 and bool(falls) and min(falls) < 0
    steepest = 1 + min(range(len(falls)), key=falls.__getitem__) if has_fallen else 0
    return LrRange(
        directory=directory,
        rates=rates,
        losses=losses,
        smoothed=smoothed,
        has_diverged=has_diverged,
        steepest=rates[steepest] if has_fallen else None,
        tenth_of_minimum=rates[lowest] / 10 if has_fallen else None,
    )


def smooth(values: Sequence[float], deviation: float) -> tuple[float, ...]:
    """Means weighted by a bell curve of that many steps around each: without lag, unlike a running mean."""
    reach = math.ceil(3 * deviation)
    weights = [math.exp(-0.5 * (offset / deviation) ** 2) for offset in range(-reach, reach + 1)]
    result = []
    for center in range(len(values)):
        # As far to both sides, so that the mean of a line is on the line.
        own = min(reach, center, len(values) - 1 - center)
        window = weights[reach - own : reach + own + 1]
        total = sum(w * v for w, v in zip(window, values[center - own : center + own + 1], strict=True))
        result.append(total / sum(window))
    return tuple(result)
