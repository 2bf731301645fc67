"""Whether a run used every sequence exactly once, by what its events tell: `distft audit RUN`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distft.config import load_yaml, parse
from distft.data.feed import Feed
from distft.errors import ConfigError, DistftError
from distft.run.check import read_checked
from distft.run.config import RunConfig
from distft.run.train import CONFIG_FILE
from distft.topology import Topology
from distft.tracker import EVENTS_FILE, LEDGER, read_lines

_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What became of the run's sequences in its final history, up to its last commit."""

    step: int
    num_sequences: int  # that should have been used
    missing: tuple[tuple[int, int], ...]  # places in the run's order that no rank used
    repeated: tuple[tuple[int, int], ...]  # places that were used more than once
    num_starts: int
    num_lost_steps: int  # done again after faults; they are not in the final history
    world_sizes: tuple[int, ...]  # one after the other
    uses_per_row: tuple[int, int] | None = None  # least and most, over the rows of the data

    @property
    def is_exact(self) -> bool:
        return not self.missing and not self.repeated


def audit_events(events: Sequence[Mapping[str, Any]]) -> Audit:
    """Follow the starts, saves and resumes of a run; raises `ConfigError` where there was no commit."""
    saves: dict[int, Mapping[str, Any]] = {}
    num_starts, num_lost, furthest = 0, 0, 0
    world_sizes: list[int] = []
    for event in events:
        kind = event.get("kind")
        if kind in {"start", "resume"}:
            num_starts += 1
            num_lost += max(0, furthest - int(event["step"]))
            furthest = int(event["step"])
            saves = {step: save for step, save in saves.items() if step <= furthest}
            world_sizes.append(int(event["world_size"]))
        if kind == LEDGER:
            saves[int(event["step"])] = event
        furthest = max(furthest, int(event.get("step", 0)))
    if not saves:
        raise ConfigError("Nothing to audit: no event tells of a commit with the sequences that it covers.")
    step, last = max(saves.items())
    num_sequences = int(last["sequences_seen"])
    used = [(int(start), int(stop)) for start, stop in last["used"]]
    return Audit(
        step=step,
        num_sequences=num_sequences,
        missing=_gaps(used, num_sequences),
        repeated=tuple((int(a), int(b)) for a, b in last["used_again"]),
        num_starts=num_starts,
        num_lost_steps=num_lost,
        world_sizes=tuple(world_sizes),
    )


def _gaps(used: Sequence[tuple[int, int]], stop: int) -> tuple[tuple[int, int], ...]:
    edges = [0, *(edge for interval in used for edge in interval), stop]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return tuple((start, end) for start, end in pairs if start != end)


def audit_run(run_dir: str) -> tuple[Audit, str]:
    """The audit of a run's directory, and why its rows could not be counted (empty where they were).

    Rows are counted by the order of data, where the data that the run's configuration names is still there.
    """
    path = Path(run_dir)
    if not (path / EVENTS_FILE).exists():
        raise ConfigError(f"{run_dir} holds no {EVENTS_FILE}: name the run_dir of a run.")
    audit = audit_events(read_lines(path / EVENTS_FILE))
    try:
        config: RunConfig = parse(
            RunConfig, load_yaml(str(path / CONFIG_FILE)), where=str(path / CONFIG_FILE)
        )
        _, inputs = read_checked(config, Topology())
    except (DistftError, OSError) as error:
        return audit, str(error)
    uses = uses_per_row(inputs.train, audit.num_sequences)
    return Audit(**{name: getattr(audit, name) for name in audit.__slots__} | {"uses_per_row": uses}), ""


def uses_per_row(feed: Feed, num_sequences: int) -> tuple[int, int]:
    """How often the first `num_sequences` of the order use a row of the data: least and most."""
    counts = [np.zeros(size, np.int64) for size in feed.dataset_sizes]
    for start in range(0, num_sequences, _ROWS_AT_ONCE):
        sources, rows = feed.locate(start, min(start + _ROWS_AT_ONCE, num_sequences))
        for source in range(len(counts)):
            counts[source] += np.bincount(rows[sources == source], minlength=len(counts[source]))
    return min(int(count.min()) for count in counts), max(int(count.max()) for count in counts)
