"""Audits whether a run used every sequence exactly once, from its events: `distft audit RUN`."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.checkpoint.manifest import Progress
from distft.config import load_yaml, parse
from distft.errors import ConfigError, DataError, DistftError
from distft.run.check import check_run
from distft.run.config import RunConfig
from distft.run.paths import CONFIG_FILE, data_paths
from distft.topology import Topology
from distft.tracker import EVENTS_FILE, HANG_EVENT, LEDGER_EVENT, read_lines

if TYPE_CHECKING:
    from distft.data.feed import AnyFeed

_CHUNK_ROWS = 1 << 20
_MAX_COUNT = 1 << 62


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """Use of the run's sequences up to its last commit, without steps that a failure discarded."""

    step: int
    num_sequences: int  # expected to be used
    missing: tuple[tuple[int, int], ...]  # intervals of the run's order that no rank used
    repeated: tuple[tuple[int, int], ...]  # intervals used more than once
    num_starts: int
    num_lost_steps: int  # that ran, and were or are done again; of a killed start, those that it logged
    num_uncommitted_steps: int = 0  # after `step`, of the last start: if it ended, a resume does them again
    world_sizes: tuple[int, ...]  # of each start, in order
    uses_per_row: tuple["SourceUse", ...] | None = None  # of each source of the data, in its order

    @property
    def is_exact(self) -> bool:
        return not self.missing and not self.repeated


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceUse:
    """How often the run used the rows of one source."""

    name: str  # the setting that names it
    num_rows: int
    least: int
    most: int


@dataclass(slots=True)
class _Start:
    """What the events of one start tell."""

    first_step: int  # from which it started
    world_size: int
    last_step: int  # that it reached
    ledgers: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # of its commits, by step


def audit_events(events: Sequence[Mapping[str, Any]], committed: Progress | None = None) -> Audit:
    """Audit a run from the events of its starts, saves and resumes. Raises `ConfigError` without a commit.

    `committed` is the progress in the newest commit: a run that was killed may not have told of it. Starts
    may overlap: then the last one counts, and all that the others did after it began is lost.
    """
    starts = _starts(events)
    ledgers: dict[int, Mapping[str, Any]] = {}
    for start in starts:
        ledgers = {step: one for step, one in ledgers.items() if step <= start.first_step} | start.ledgers
    if committed is not None and committed.step > max(ledgers, default=-1):
        ledgers[committed.step] = committed.model_dump()
    if not ledgers or not starts:
        raise ConfigError("Nothing to audit: no event records a checkpoint and the sequences that it covers.")
    step, last = max(ledgers.items())
    starts[-1].last_step = max(starts[-1].last_step, step)
    num_sequences = _count(last, "sequences_seen")
    used = _intervals(last, "used")
    return Audit(
        step=step,
        num_sequences=num_sequences,
        missing=_gaps(used, num_sequences),
        repeated=tuple(_intervals(last, "used_again")),
        num_starts=len(starts),
        # A fork begins at the step of another run's commit.
        num_lost_steps=sum(one.last_step - one.first_step for one in starts)
        - (starts[-1].last_step - starts[0].first_step),
        num_uncommitted_steps=starts[-1].last_step - step,
        world_sizes=tuple(one.world_size for one in starts),
    )


def _starts(events: Sequence[Mapping[str, Any]]) -> list[_Start]:
    """The starts of a run in order. Events of old versions have no `start_id`: they are the last start's."""
    starts: list[_Start] = []
    by_id: dict[str, _Start] = {}
    for event in events:
        kind, step = event.get("kind"), _count(event, "step", default=0)
        if kind in {"start", "resume"}:
            if starts:
                reached = step + _count(event, "discarded_steps", default=0)
                starts[-1].last_step = max(starts[-1].last_step, reached)
            starts.append(_Start(step, _count(event, "world_size"), last_step=step))
            by_id[str(event.get("start_id", "unknown"))] = starts[-1]
        elif starts and kind != HANG_EVENT:  # whose step is not complete
            start = by_id.get(str(event.get("start_id", "")), starts[-1])
            start.last_step = max(start.last_step, step)
            if kind == LEDGER_EVENT:
                start.ledgers[step] = event
    return starts


def _count(event: Mapping[str, Any], field: str, *, default: int | None = None) -> int:
    """An integer of at least 0. Raises `DataError` for anything else."""
    value = event.get(field, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_COUNT:
        raise _damaged(event, field, value)
    return value


def _intervals(event: Mapping[str, Any], field: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for pair in event.get(field) or ():
        match pair:
            case [int(start), int(stop)] if 0 <= start <= stop < _MAX_COUNT:
                found.append((start, stop))
            case _:
                raise _damaged(event, field, pair)
    return found


def _damaged(event: Mapping[str, Any], field: str, value: Any) -> DataError:
    kind = str(event.get("kind"))[:60]
    return DataError(
        f"{EVENTS_FILE}: the event {kind!r} has {field}={str(value)[:60]}, which distft does not write: the "
        "file is damaged, so it proves nothing."
    )


def _gaps(used: Sequence[tuple[int, int]], stop: int) -> tuple[tuple[int, int], ...]:
    edges = [0, *(edge for interval in used for edge in interval), stop]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, end) for start, end in pairs if start != end)


def audit_run(run_dir: str, *, trust: bool = False) -> tuple[Audit, str]:
    """The audit of a run's directory, and why rows could not be counted (empty if they were).

    Rows are counted only if the data of the run's configuration still exists. `trust` imports classes outside
    distft that the configuration names, which runs their code.
    """
    path = Path(run_dir)
    if not (path / EVENTS_FILE).exists():
        reason = f"contains no {EVENTS_FILE}" if path.is_dir() else "is no directory"
        raise ConfigError(f"{run_dir} {reason}: give the run_dir of a run.")
    audit = audit_events(read_lines(path / EVENTS_FILE), _newest_progress(run_dir))
    try:
        config: RunConfig = parse(
            RunConfig, load_yaml(str(path / CONFIG_FILE)), where=str(path / CONFIG_FILE), trust=trust
        )
        _, inputs = check_run(config, Topology())
    except (DistftError, OSError) as error:
        return audit, str(error)
    names = [key.removesuffix(".path") for key in data_paths("data", config.data)]
    uses = uses_per_row(inputs.train, audit.num_sequences, names)
    return replace(audit, uses_per_row=uses), ""


def _newest_progress(run_dir: str) -> Progress | None:
    """The progress in the run's newest commit; None if it cannot be read."""
    from distft.checkpoint.committed import find_checkpoint  # imports torch

    with contextlib.suppress(DistftError, OSError):
        return find_checkpoint(run_dir, newest=True).manifest.progress
    return None


def uses_per_row(feed: "AnyFeed", num_sequences: int, names: Sequence[str]) -> tuple[SourceUse, ...]:
    """How often the run's first `num_sequences` use the rows of each source; `names` of the sources."""
    import numpy as np

    counts = [np.zeros(size, np.int64) for size in feed.dataset_sizes]
    for start in range(0, num_sequences, _CHUNK_ROWS):
        sources, rows = feed.lookup(start, min(start + _CHUNK_ROWS, num_sequences))
        for source in range(len(counts)):
            counts[source] += np.bincount(rows[sources == source], minlength=len(counts[source]))
    if len(names) != len(counts):  # of a class outside distft
        names = [f"source {number}" for number in range(len(counts))]
    return tuple(
        SourceUse(name=name, num_rows=len(uses), least=int(uses.min()), most=int(uses.max()))
        for name, uses in zip(names, counts, strict=True)
    )
