"""Runs a search: checks it before Ray is imported, runs its trials, and writes what it has found."""

import contextlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.cluster.paths import RunPaths
from distft.cluster.tune.scratch import remove_dead_scratch
from distft.cluster.tune.trial import STOP_FILE, SearchTask
from distft.config import redact
from distft.config.yaml_text import to_yaml
from distft.errors import ConfigError
from distft.run.config import SEARCH_SECTION, parse_run_config
from distft.search.journal import VERSION, Journal, TrialRecord, metric_of, read_journal
from distft.search.journal_lines import FIRST_REPEAT
from distft.search.lock import only_search
from distft.search.ranking import Ranked, best_of, ranked, search_json, write_search_json
from distft.search.search_file import (
    SearchFile,
    fixed_points,
    load_search,
    ranks_of,
    require_own_directory,
    require_sampler,
    with_values,
)
from distft.search.settings import NoSchedulerConfig, SearchConfig
from distft.search.space import Values
from distft.search.trial_runs import Member, members, repeat_members, run_settings, trial_dir, write_private

if TYPE_CHECKING:
    from distft.cluster.tune.tune_run import TuneRun

BEST_FILE = "best.yaml"
# Of a search that goes on these may change; all others decide which trials there are, or how they compare.
_MAY_CHANGE = ("num_trials", "max_concurrent", "value", "repeat_best")


@dataclass(slots=True)
class Outcome:
    """What a search has found so far."""

    directory: Path
    search: SearchConfig
    metric: str | None
    rows: list[Ranked]  # the best first
    best: Ranked | None
    trials: list[TrialRecord]  # those that repeat the best included
    best_file: Path | None = field(default=None)  # the configuration of the best trial


def run_search(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    environ: MutableMapping[str, str],
    retry_failed: bool = False,
    show: Callable[[str], None] = print,
) -> Outcome:
    """Run the search that a configuration describes, or go on with it, to its end.

    `retry_failed`: failed trials of an earlier start run again. Raises `ConfigError`, `DataError` or
    `CheckpointError` before any trial starts, `ConfigError` if no run reports the metric, `LaunchError` if
    Ray cannot start or has not enough for a trial, and `Preempted` after SIGINT or SIGTERM, once trials have
    saved.
    """
    paths = RunPaths.find(environ, cwd=Path.cwd(), home=Path.home())
    file = load_search(config_path, overrides)
    require_sampler(file.search)
    directory = Path(paths.output_path(file.config.run_dir))
    require_own_directory(directory)
    if not has_results(read_journal(directory).lines):
        with contextlib.chdir(paths.working_dir):
            check_first_runs(file, directory)
    with only_search(directory), contextlib.closing(open_journal(file, directory)) as journal:
        for note in journal.notes:
            show(f"note: {note}")
        remove_dead_scratch(directory)
        (directory / STOP_FILE).unlink(missing_ok=True)
        if retry_failed:
            for trial in journal.trials.values():
                if trial.state == "failed":
                    journal.append("again", number=trial.number)
        working_dir = None if paths.is_uploaded else paths.working_dir
        search = _Search(file, directory, working_dir, journal, show)
        try:
            search.run(environ)
        finally:
            (directory / STOP_FILE).unlink(missing_ok=True)
            search.write()
        return search.outcome(with_best_file=True)


class _Search:
    def __init__(
        self,
        file: SearchFile,
        directory: Path,
        working_dir: Path | None,
        journal: Journal,
        show: Callable[[str], None],
    ) -> None:
        self._file, self._directory, self._journal, self._show = file, directory, journal, show
        self._task = SearchTask(
            base=file.base,
            config=file.config,
            search=file.search,
            directory=directory,
            working_dir=working_dir,
            environment=file.config.cluster.env,
            members=members(file.search),
            counts_best=file.counts_best,
        )

    def run(self, environ: MutableMapping[str, str]) -> None:
        """Run all that is left to do. Nothing is imported or started if that is nothing."""
        points = fixed_points(self._file.search)
        self._add_trials(points)
        if self._is_over():
            self._show("All trials of this search have ended.")
            return
        from distft.cluster.tune.tune_run import Stop, TuneRun, run_on_ray_tune

        stop = Stop(self._directory)

        def first() -> "TuneRun | None":
            if not self._own_left() and points is not None:
                return None
            own = None if points is None else {n: t.values for n, t in self._own().items()}
            return TuneRun(self._task, self._journal, self._show, self.write, stop, own)

        def repeats() -> "TuneRun | None":
            again = self._add_repeats()
            if not any(not trial.has_ended for trial in again.values()):
                return None
            search = self._file.search.model_copy(update={"scheduler": NoSchedulerConfig()})
            task = _changed(self._task, search=search, members=repeat_members(search, self._file.config))
            values = {number: trial.values for number, trial in again.items()}
            return TuneRun(task, self._journal, self._show, self.write, stop, values)

        most_ranks = max(ranks_of(self._file.search, values) for values in _all_values(self._file.search))
        run_on_ray_tune([first, repeats], self._task, stop, self._show, environ, most_ranks=most_ranks)

    def _own(self) -> dict[int, TrialRecord]:
        """The trials without repetitions."""
        return {n: trial for n, trial in self._journal.trials.items() if trial.repeat_of is None}

    def _own_left(self) -> bool:
        own = self._own()
        is_short = len(own) < self._file.search.num_points
        return is_short or any(not trial.has_ended for trial in own.values())

    def _is_over(self) -> bool:
        if self._own_left():
            return False
        again = self._add_repeats()
        return all(trial.has_ended for trial in again.values())

    def _add_trials(self, points: Sequence[Values] | None) -> None:
        """Of fixed points all that the journal does not have yet."""
        for number, values in enumerate(points or ()):
            if number not in self._journal.trials:
                ranks = ranks_of(self._file.search, values)
                self._journal.append("trial", number=number, values=values, ranks=ranks)

    def _add_repeats(self) -> dict[int, TrialRecord]:
        """The trials that repeat the best ones, once all others have ended."""
        search, trials = self._file.search, self._journal.trials
        again = {number: trial for number, trial in trials.items() if trial.repeat_of is not None}
        if again or search.repeat_best is None or self._own_left():
            return again
        for row in self.outcome().rows[: search.repeat_best.count]:
            if row.trial.state == "completed" and row.is_feasible:
                number = FIRST_REPEAT + row.trial.number
                fields = {"values": row.trial.values, "ranks": row.trial.ranks, "repeat_of": row.trial.number}
                self._journal.append("trial", number=number, **fields)
        return {number: trial for number, trial in trials.items() if trial.repeat_of is not None}

    def outcome(self, *, with_best_file: bool = False) -> Outcome:
        found = outcome_of(self._journal.lines, self._journal.trials, self._file, self._directory)
        if with_best_file and found.best is not None:
            found.best_file = self._directory / BEST_FILE
            write_private(found.best_file, best_yaml(self._file, found.best))
        return found

    def write(self) -> None:
        """Replace search.json by what is known now."""
        found = self.outcome()
        write_search_json(
            self._directory, search_json(found.rows, found.metric, found.search, self._directory)
        )


def outcome_of(
    lines: Sequence[Mapping[str, Any]],
    trials: Mapping[int, TrialRecord],
    file: SearchFile,
    directory: Path,
) -> Outcome:
    """What a journal says of a search."""
    metric = metric_of(lines, file.search)
    all_trials = list(trials.values())
    rows = ranked(all_trials, metric, file.search, best=file.counts_best)
    return Outcome(directory, file.search, metric, rows, best_of(rows), all_trials)


def best_yaml(file: SearchFile, best: Ranked) -> str:
    """A configuration of one run with the settings of a trial, in a folder of its own."""
    settings = {
        **with_values(file.base, best.trial.values),
        "run_dir": str(Path(file.config.run_dir) / "best"),
    }
    launcher = "" if best.trial.ranks == 1 else f"torchrun --nproc-per-node {best.trial.ranks} -m "
    lines = [
        f"# Trial {best.trial.number} of the search in {file.config.run_dir}, the best of "
        f"{file.search.num_points}: {launcher}distft train {Path(file.config.run_dir) / BEST_FILE}",
    ]
    if best.trial.is_population:
        lines.append("# It went on from other trials with changed settings: these are its last ones alone.")
    return "\n".join(lines) + "\n" + to_yaml(settings)


def check_first_runs(file: SearchFile, directory: Path) -> None:
    """Raise all that the first trial's run would before it trains, on each number of ranks."""
    from distft.run import check
    from distft.topology import Topology

    search = file.search
    first = (fixed_points(search) or [{key: one.checked_values()[0] for key, one in search.space.items()}])[0]
    run_dir = trial_dir(directory, 0)
    settings = run_settings(
        file.base, file.config, search, values=first, member=members(search)[0], run_dir=run_dir
    )
    config = parse_run_config(settings)
    for ranks in sorted({ranks_of(search, values) for values in _all_values(search)}):
        check.check_run(config, Topology(world_size=ranks))


def _all_values(search: SearchConfig) -> list[Values]:
    """One for each number of ranks that the space has."""
    from distft.search.settings import RANKS

    ranks = search.space.get(RANKS)
    return [{RANKS: value} for value in ranks.checked_values()] if ranks is not None else [{}]


def open_journal(file: SearchFile, directory: Path) -> Journal:
    """The journal of a new search, or of one that goes on with the same settings.

    Raises `ConfigError` with all settings that changed but may not, once a trial has reported a value.
    """
    directory.mkdir(parents=True, exist_ok=True)
    journal = Journal(directory)
    search, base = redact(file.search.model_dump(mode="json")), redact(file.base)
    before = next((line for line in reversed(journal.lines) if line.get("kind") == "search"), None)
    if before is not None and has_results(journal.lines):
        _require_same(before, search, base, directory)
    if before is None or (before["search"], before["base"]) != (search, base):
        journal.append("search", version=VERSION, search=search, base=base)
    return journal


def has_results(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a trial has reported anything."""
    return any(line.get("kind") == "result" for line in lines)


def _require_same(
    before: Mapping[str, Any], search: Mapping[str, Any], base: Mapping[str, Any], directory: Path
) -> None:
    if (before["search"], before["base"]) == (search, base):
        return
    from distft.run.resume import describe_changes  # imports torch

    changes = []
    for name in dict.fromkeys([*before["search"], *search]):
        if name not in _MAY_CHANGE:
            changes += describe_changes(
                f"{SEARCH_SECTION}.{name}", before["search"].get(name), search.get(name)
            )
    for name in dict.fromkeys([*before["base"], *base]):
        changes += describe_changes(name, before["base"].get(name), base.get(name))
    num_before, num_now = before["search"].get("num_trials"), search.get("num_trials")
    if num_before is not None and num_now is not None and num_now < num_before:
        changes.append(
            f"{SEARCH_SECTION}.num_trials was {num_before} and is now {num_now}: it may only grow."
        )
    if changes:
        changes.append(
            f"{directory} has trials of another search. Restore the old values, or choose another run_dir."
        )
        raise ConfigError("\n".join(changes))


def _changed(task: SearchTask, *, search: SearchConfig, members: Sequence[Member]) -> SearchTask:
    import dataclasses

    return dataclasses.replace(task, search=search, members=members)
