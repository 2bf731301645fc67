"""The configuration of a search: the settings of its runs, and the section `search`, checked together."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

from distft.config import apply_overrides, load_yaml, parse
from distft.errors import ConfigError, ErrorCollector
from distft.run.config import SEARCH_SECTION, RunConfig, parse_run_config
from distft.run.paths import CONFIG_FILE, CONFIG_HEADER
from distft.search.journal import JOURNAL_FILE
from distft.search.metrics import VALIDATION
from distft.search.settings import (
    RANKS,
    GridConfig,
    HyperbandConfig,
    PopulationConfig,
    SearchConfig,
    is_below,
)
from distft.search.space import Values, grid_points, random_point
from distft.tracker.jsonl import EVENTS_FILE


class FileSettings(RunConfig):
    """All settings that a configuration file may have, for editors: those of a run, and of a search."""

    search: SearchConfig | None = None  # what distft tune varies; other commands refuse it


@dataclass(frozen=True, slots=True)
class SearchFile:
    """A search as the user's file and overrides describe it."""

    base: dict[str, Any]  # the settings of its runs, as they stand there
    config: RunConfig  # what these are, without any that the search varies
    search: SearchConfig

    @property
    def directory(self) -> Path:
        """Of all that the search writes: the `run_dir` of the file."""
        return Path(self.config.run_dir)

    @property
    def counts_best(self) -> bool:
        """Whether the best value of a run counts, in place of its last one."""
        return self.search.counts_best(stops_early=self.config.train.early_stopping is not None)


def load_search(path: str | Path, overrides: Sequence[str] = ()) -> SearchFile:
    """Read a configuration with a section `search`. Raises one `ConfigError` with all that is wrong in it.

    Every single value of the space is tried with the other settings, and of a range both ends.
    """
    raw = apply_overrides(load_yaml(path), overrides)
    if raw.get(SEARCH_SECTION) is None:
        raise ConfigError(
            f"{path} has no section {SEARCH_SECTION}: say there what to vary, such as "
            "search: {space: {optim.peak_lr: [1.0e-3, 3.0e-3]}, sampler: {type: grid}}. "
            "`distft train` trains one run."
        )
    base = {key: value for key, value in raw.items() if key != SEARCH_SECTION}
    errors = ErrorCollector()
    search = config = None
    with errors.collect():
        search = parse(SearchConfig, raw[SEARCH_SECTION], where=SEARCH_SECTION)
    if search is not None and search.folds is not None and "validation" not in _given(base):
        base = {**base, "validation": fold_settings(search, 0, 0)}
    with errors.collect():
        config = parse_run_config(base)
    if search is not None and config is not None:
        for problem in (*_problems(search, config), *_value_problems(base, search)):
            with errors.collect():
                raise ConfigError(problem)
    errors.raise_if_any()
    assert search is not None
    assert config is not None
    return SearchFile(base, config, search)


def _given(base: Mapping[str, Any]) -> set[str]:
    """The sections that are not null."""
    return {key for key, value in base.items() if value is not None}


def fold_settings(search: SearchConfig, fold: int, split_seed: int) -> dict[str, Any]:
    """The section `validation` of a run that holds out one fold."""
    return {"type": "split", "num_folds": search.folds, "fold": fold, "split_seed": split_seed}


def _problems(search: SearchConfig, config: RunConfig) -> Iterator[str]:
    """What does not fit together, as far as it shows before a run."""
    names = [search.metric] if search.metric else []
    needs_validation = any(name.startswith(VALIDATION) for name in (*names, *search.metrics))
    if config.validation is None and search.folds is None and (needs_validation or search.metric is None):
        shown = f"search.metric={search.metric}" if search.metric else "search.metric is not set, so it"
        yield (
            f"{shown} is of validation data, and validation is not set: set it, such as "
            "{type: split, share: 0.1}."
        )
    kind, every = search.scheduler.type, config.evaluation.every_steps
    is_held_out = search.metric is None or search.metric.startswith(VALIDATION)
    if kind != "none" and is_held_out and every is None:
        yield f"search.scheduler.type={kind} decides while a run trains: set evaluation.every_steps."
    if isinstance(search.scheduler, PopulationConfig) and every is not None:
        interval = search.scheduler.interval_steps
        if interval % every:
            yield (
                f"search.scheduler.interval_steps={interval} is no multiple of "
                f"evaluation.every_steps={every}, at which a run is evaluated and saved."
            )
    if isinstance(search.scheduler, PopulationConfig):
        if config.train.max_steps is None:
            yield "search.scheduler.type=population must know the last step: set train.max_steps."
        if config.train.early_stopping is not None:
            yield "search.scheduler.type=population decides who goes on: leave out train.early_stopping."
        fixed = (
            "data",
            "objective",
            "model",
            "seed",
            "trainable",
            "lora",
            "phases",
            "batch.global_batch_size",
        )
        for key in search.space:
            if any(is_below(key, one) for one in fixed):
                yield (
                    f"search.space: {key} cannot change in the middle of a run, as a population's trials do: "
                    "vary settings of optim, or choose another scheduler."
                )
    if isinstance(search.scheduler, HyperbandConfig) and config.train.max_steps is None:
        yield "search.scheduler.type=hyperband plans each trial's length in steps: set train.max_steps."
    if search.repeat_best is not None and set(search.repeat_best.seeds) <= set(own_seeds(search, config)):
        yield "search.repeat_best.seeds: each trial trains with these seeds anyway: name others."
    is_split = config.validation is None or config.validation.type == "split"
    if search.folds is not None and not is_split:
        yield (
            f"search.folds={search.folds} holds out rows of data, and validation.type="
            f"{getattr(config.validation, 'type', '')} names other rows: leave validation out."
        )


def _value_problems(base: Mapping[str, Any], search: SearchConfig) -> list[str]:
    """The problem of each value of the space that the other settings do not allow."""
    problems: dict[str, None] = {}
    for key, distribution in search.space.items():
        for value in distribution.checked_values():
            try:
                parse_run_config(with_values(base, {key: value}))
            except ConfigError as error:
                for line in str(error).splitlines():
                    problems[f"search.space: {line}"] = None
    return list(problems)


def with_values(base: Mapping[str, Any], values: Values) -> dict[str, Any]:
    """The settings with those of a trial in their places; `ranks` is none of them."""
    return apply_overrides(base, [f"{key}={json.dumps(v)}" for key, v in values.items() if key != RANKS])


def fixed_points(search: SearchConfig) -> list[Values] | None:
    """The settings of every trial; None if they depend on results.

    A scheduler that judges a trial by those before it gets a grid in an order drawn once for all: in its own,
    neighbours are alike, and where they get better and better, each of them is kept.
    """
    if isinstance(search.sampler, GridConfig):
        points = grid_points(search.grid)
        if search.scheduler.type in {"asha", "median"}:
            Random("order of a grid").shuffle(points)
        return points
    if search.sampler.type == "random":
        return [random_point(search.space, search.sampler.seed, i) for i in range(search.num_points)]
    return None


def own_seeds(search: SearchConfig, config: RunConfig) -> tuple[int, ...]:
    """With which each trial trains, before any is repeated."""
    return search.seeds or (config.seed,)


def ranks_of(search: SearchConfig, values: Values) -> int:
    """Of a trial."""
    return int(values.get(RANKS, search.ranks))


def require_sampler(search: SearchConfig) -> None:
    """Raise `ConfigError` if the library of the sampler is not installed."""
    kind = search.sampler.type
    if kind in {"optuna", "hyperopt"} and find_spec(kind) is None:
        raise ConfigError(
            f"search.sampler.type={kind} needs {kind}, which is not installed: pip install 'distft[tune]'"
        )


def require_own_directory(directory: Path) -> None:
    """Raise `ConfigError` if something else than a search has begun there."""
    if (directory / JOURNAL_FILE).is_file() or not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"run_dir={directory} is a file: choose another run_dir for the search.")
    if (directory / EVENTS_FILE).exists():
        raise ConfigError(f"run_dir={directory} is that of a run: choose another run_dir for the search.")
    foreign = directory / CONFIG_FILE
    with contextlib.suppress(OSError):
        if foreign.is_file() and not foreign.read_text().startswith(CONFIG_HEADER):
            raise ConfigError(f"run_dir={directory} has a {CONFIG_FILE} of another program: choose another.")
