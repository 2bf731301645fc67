"""The runs of a trial: which there are, and the configuration of each."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft import storage
from distft.config import apply_overrides
from distft.run.config import RunConfig
from distft.search.search_file import fold_settings, own_seeds, with_values
from distft.search.settings import PopulationConfig, SearchConfig
from distft.search.space import Values
from distft.tracker.named_run import NamedRun

TRIALS_DIR = "trials"
_KEEP_ALL = 1_000_000  # commits; another trial of a population may go on from any of them


@dataclass(frozen=True, slots=True)
class Member:
    """One of the runs whose mean is a trial's value."""

    seed: int | None = None  # None: that of the settings
    fold: int | None = None

    @property
    def name(self) -> str:
        """Of its folder in the trial's; `run`: the trial's itself."""
        parts = [
            f"{name}_{value}"
            for name, value in (("seed", self.seed), ("fold", self.fold))
            if value is not None
        ]
        return "_".join(parts) or "run"


def members(search: SearchConfig) -> list[Member]:
    """The runs of each trial, in the order in which they train."""
    return [
        Member(seed, fold)
        for seed in (search.seeds or (None,))
        for fold in (range(search.folds) if search.folds is not None else (None,))
    ]


def repeat_members(search: SearchConfig, config: RunConfig) -> list[Member]:
    """The runs of each repeated trial; those with seeds that the trial itself had are not there again."""
    assert search.repeat_best is not None
    own = own_seeds(search, config)
    seeds = [seed for seed in search.repeat_best.seeds if seed not in own]
    folds = range(search.folds) if search.folds is not None else (None,)
    return [Member(seed, fold) for seed in seeds for fold in folds]


def trial_dir(directory: Path, number: int) -> Path:
    """The folder of all runs of a trial."""
    return directory / TRIALS_DIR / f"{number:05d}"


def run_dir_of(directory: Path, number: int, name: str) -> Path:
    """Of a run of the trial, by its name."""
    folder = trial_dir(directory, number)
    return folder if name == "run" else folder / name


def run_settings(
    base: Mapping[str, Any],
    config: RunConfig,
    search: SearchConfig,
    *,
    values: Values,
    member: Member,
    run_dir: Path,
) -> dict[str, Any]:
    """The configuration of one run of a trial, as plain data: a file of `distft train`."""
    raw = {**with_values(base, values), "run_dir": str(run_dir)}
    if raw.get("num_threads") is None and config.device != "cuda":
        raw["num_threads"] = max(1, int(config.cluster.cpus_per_worker))  # its share of the machine
    if member.seed is not None:
        raw["seed"] = member.seed
    if member.fold is not None:
        split_seed = getattr(config.validation, "split_seed", 0)
        raw["validation"] = fold_settings(search, member.fold, split_seed)
    changes = []
    if config.checkpoint.directory is not None:
        own = storage.join(config.checkpoint.directory, *run_dir.parts[-2:])
        changes.append(f"checkpoint.directory={json.dumps(own)}")
    changes += _tracker_changes(config, run_dir)
    if isinstance(search.scheduler, PopulationConfig):
        changes.append(f"checkpoint.every_steps={search.scheduler.interval_steps}")
        changes.append(f"checkpoint.keep_last={_KEEP_ALL}")
    return apply_overrides(raw, changes)


def _tracker_changes(config: RunConfig, run_dir: Path) -> Iterator[str]:
    """In a service, a run is called after its trial, and all of a search are one group."""
    own = "/".join(part for part in run_dir.parts[-2:] if part != TRIALS_DIR)
    for number, tracker in enumerate(config.trackers):
        if not isinstance(tracker, NamedRun):
            continue
        if tracker.name is not None:
            yield f"trackers.{number}.name={json.dumps(f'{tracker.name} {own}')}"
        if tracker.group is None:
            yield f"trackers.{number}.group={json.dumps(Path(config.run_dir).name)}"


def checkpoints_of(settings: Mapping[str, Any]) -> str:
    """Where a run with these settings saves."""
    directory = (settings.get("checkpoint") or {}).get("directory")
    return directory or storage.join(settings["run_dir"], "checkpoints")


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone may read, since settings may have secrets, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.tmp")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)
