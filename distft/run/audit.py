"""Audits whether a run used every sequence exactly once, from its events: `distft audit RUN`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config import load_yaml, parse
from distft.errors import ConfigError, DistftError
from distft.run.check import check_run
from distft.run.config import RunConfig
from distft.run.paths import CONFIG_FILE
from distft.topology import Topology
from distft.tracker import EVENTS_FILE, LEDGER_EVENT, read_lines

if TYPE_CHECKING:
    from distft.data.feed import Feed

_CHUNK_ROWS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """Use of the run's sequences up to its last commit, without steps that a failure discarded."""

    step: int
    num_sequences: int  # expected to be used
    missing: tuple[tuple[int, int], ...]  # intervals of the run's order that no rank used
    repeated: tuple[tuple[int, int], ...]  # intervals used more than once
    num_starts: int
    num_lost_steps: int  # repeated after failures
    world_sizes: tuple[int, ...]  # of each start, in order
    uses_per_row: tuple[int, int] | None = None  # minimum and maximum over the rows of the data

    @property
    def is_exact(self) -> bool:
        return not self.missing and not self.repeated


def audit_events(events: Sequence[Mapping[str, Any]]) -> Audit:
    """Audit a run from the events of its starts, saves and resumes. Raises `ConfigError` without a commit."""
    saves: dict[int, Mapping[str, Any]] = {}
    num_starts, num_lost_steps, last_step = 0, 0, 0
    world_sizes: list[int] = []
    for event in events:
        kind = event.get("kind")
        if kind in {"start", "resume"}:
            num_starts += 1
            num_lost_steps += max(0, last_step - int(event["step"]))
            last_step = int(event["step"])
            saves = {step: save for step, save in saves.items() if step <= last_step}
            world_sizes.append(int(event["world_size"]))
        if kind == LEDGER_EVENT:
            saves[int(event["step"])] = event
        last_step = max(last_step, int(event.get("step", 0)))
    if not saves:
        raise ConfigError("Nothing to audit: no event records a checkpoint and the sequences that it covers.")
    step, last = max(saves.items())
    num_sequences = int(last["sequences_seen"])
    used = [(int(start), int(stop)) for start, stop in last["used"]]
    return Audit(
        step=step,
        num_sequences=num_sequences,
        missing=_gaps(used, num_sequences),
        repeated=tuple((int(a), int(b)) for a, b in last["used_again"]),
        num_starts=num_starts,
        num_lost_steps=num_lost_steps,
        world_sizes=tuple(world_sizes),
    )


def _gaps(used: Sequence[tuple[int, int]], stop: int) -> tuple[tuple[int, int], ...]:
    edges = [0, *(edge for interval in used for edge in interval), stop]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, end) for start, end in pairs if start != end)


def audit_run(run_dir: str) -> tuple[Audit, str]:
    """The audit of a run's directory, and why rows could not be counted (empty if they were).

    Rows are counted only if the data of the run's configuration still exists.
    """
    path = Path(run_dir)
    if not (path / EVENTS_FILE).exists():
        raise ConfigError(f"{run_dir} contains no {EVENTS_FILE}: give the run_dir of a run.")
    audit = audit_events(read_lines(path / EVENTS_FILE))
    try:
        config: RunConfig = parse(
            RunConfig, load_yaml(str(path / CONFIG_FILE)), where=str(path / CONFIG_FILE)
        )
        _, inputs = check_run(config, Topology())
    except (DistftError, OSError) as error:
        return audit, str(error)
    uses = uses_per_row(inputs.train, audit.num_sequences)
    return replace(audit, uses_per_row=uses), ""


def uses_per_row(feed: "Feed", num_sequences: int) -> tuple[int, int]:
    """How often the run's first `num_sequences` use a row of the data: minimum and maximum."""
    import numpy as np

    counts = [np.zeros(size, np.int64) for size in feed.dataset_sizes]
    for start in range(0, num_sequences, _CHUNK_ROWS):
        sources, rows = feed.lookup(start, min(start + _CHUNK_ROWS, num_sequences))
        for source in range(len(counts)):
            counts[source] += np.bincount(rows[sources == source], minlength=len(counts[source]))
    return min(int(count.min()) for count in counts), max(int(count.max()) for count in counts)
