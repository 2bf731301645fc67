"""Differences between two checkpoints, state by state; a few MiB are in memory at a time."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from distft.checkpoint.sources import CheckpointSource, read_chunks, stored_states

ProgressCallback = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class StateDifference:
    """How one state of one parameter differs between two checkpoints."""

    parameter: str
    state: str
    kind: str  # identical, differs, shape, missing (in the second), added (in the second)
    max_abs: float = 0.0
    relative: float = 0.0  # norm of the difference over the norm of the first
    num_differing: int = 0


def differences(
    first: CheckpointSource,
    second: CheckpointSource,
    states: Sequence[str] | None = None,
    on_progress: ProgressCallback | None = None,
) -> Iterator[StateDifference]:
    """Compare state by state in the order of `first`; then list the states that only `second` has.

    `states` are the names to compare; None: all.
    """
    in_first, in_second = first.manifest.parameters, second.manifest.parameters
    for name, record in in_first.items():
        for state in (s for s in stored_states(first, name) if states is None or s in states):
            if name not in in_second or state not in in_second[name].states:
                yield StateDifference(name, state, "missing")
            elif in_second[name].shape != record.shape:
                yield StateDifference(name, state, "shape")
            else:
                yield _compare(first, second, name, state, on_progress)
    for name in in_second:
        for state in (s for s in stored_states(second, name) if states is None or s in states):
            if name not in in_first or state not in in_first[name].states:
                yield StateDifference(name, state, "added")


def absent_states(found: Sequence[StateDifference]) -> dict[tuple[str, str], int]:
    """States that one checkpoint lacks entirely, such as moments: (state, kind) -> number of parameters.

    `kind` is missing or added. A state of a single parameter is left out.
    """
    kinds = Counter((d.state, d.kind) for d in found)
    totals = Counter(d.state for d in found)
    return {
        (state, kind): count
        for (state, kind), count in kinds.items()
        if kind in ("missing", "added") and count == totals[state] > 1
    }


def _compare(
    first: CheckpointSource,
    second: CheckpointSource,
    name: str,
    state: str,
    on_progress: ProgressCallback | None,
) -> StateDifference:
    largest, squares, norm, num_differing = 0.0, 0.0, 0.0, 0
    for start, chunk in read_chunks(first, name, state, on_progress):
        a, b = chunk.double(), second.read(name, state, start, start + chunk.numel()).double()
        # NaN on both sides counts as equal, on one side as an infinite difference.
        gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs().nan_to_num(math.inf))
        largest = max(largest, float(gap.max()))
        squares += float(gap.square().sum())
        norm += float(a.nan_to_num().square().sum())
        num_differing += int(gap.count_nonzero())
    kind = "differs" if num_differing else "identical"
    relative = math.sqrt(squares / norm) if norm else (math.inf if squares else 0.0)
    return StateDifference(name, state, kind, largest, relative, num_differing)
