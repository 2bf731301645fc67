"""Looking at state element by element: statistics, damage, differences. A few MiB are in memory at a time."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from distft.checkpoint.fragments import STATES, WEIGHT, fingerprint
from distft.checkpoint.sources import CheckpointSource
from distft.errors import CheckpointError, DistftError, UnreachableError

_PIECE_NUMEL = 1 << 20
_CHANGED = "is not what was saved."

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of one state of one parameter, over its finite elements."""

    mean: float
    std: float
    smallest: float
    largest: float
    num_not_finite: int


@dataclass(frozen=True, slots=True)
class Difference:
    """How one state of one parameter differs between two checkpoints."""

    parameter: str
    state: str
    kind: str  # identical, differs, shape, missing (in the second), added (in the second)
    max_abs: float = 0.0
    relative: float = 0.0  # norm of the difference over the norm of the first
    num_differing: int = 0


def states_of(source: CheckpointSource, name: str) -> list[str]:
    """The states that are kept of a parameter, in our order."""
    return [state for state in STATES if state in source.manifest.parameters[name].states]


def num_bytes(source: CheckpointSource) -> int:
    """Of all states."""
    return sum(
        prod(record.shape) * getattr(torch, state.dtype).itemsize
        for record in source.manifest.parameters.values()
        for state in record.states.values()
    )


def _pieces(source: CheckpointSource, name: str, state: str) -> Iterator[tuple[int, Tensor]]:
    numel = prod(source.manifest.parameters[name].shape)
    for start in range(0, numel, _PIECE_NUMEL):
        yield start, source.read(name, state, start, min(start + _PIECE_NUMEL, numel))


def statistics(
    source: CheckpointSource, name: str, state: str = WEIGHT, on_progress: Progress | None = None
) -> Statistics:
    """Mean, standard deviation and extremes of a state; NaN where it has no finite element."""
    count, total, squares, num_not_finite = 0, 0.0, 0.0, 0
    smallest, largest = math.inf, -math.inf
    for _, values in _pieces(source, name, state):
        finite = values.double()[torch.isfinite(values)]
        num_not_finite += values.numel() - finite.numel()
        if finite.numel():
            count += finite.numel()
            total += float(finite.sum())
            squares += float(finite.square().sum())
            smallest, largest = min(smallest, float(finite.min())), max(largest, float(finite.max()))
        if on_progress is not None:
            on_progress(values.numel() * values.element_size())
    if not count:
        return Statistics(math.nan, math.nan, math.nan, math.nan, num_not_finite)
    mean = total / count
    return Statistics(mean, math.sqrt(max(squares / count - mean**2, 0.0)), smallest, largest, num_not_finite)


def damaged_states(source: CheckpointSource, on_progress: Progress | None = None) -> list[str]:
    """What is not as it was saved, state by state; without fingerprints only what cannot be read."""
    found = []
    for name, record in source.manifest.parameters.items():
        for state in states_of(source, name):
            try:
                total = 0
                for start, values in _pieces(source, name, state):
                    total += fingerprint(values, start)
                    if on_progress is not None:
                        on_progress(values.numel() * values.element_size())
            except UnreachableError:
                raise
            except (DistftError, OSError) as error:
                found.append(f"{state} of {name} cannot be read: {error}")
                continue
            saved = record.states[state].fingerprint
            if saved is not None and saved != f"{total % (1 << 64):016x}":
                found.append(f"{state} of {name} {_CHANGED}")
    return found


def all_faults(source: CheckpointSource, on_progress: Progress | None = None) -> list[str]:
    """What is wrong with the files, and which tensors that concerns."""
    faults = source.faults()
    states = damaged_states(source, on_progress)
    if faults:  # then it is clear why something cannot be read
        states = [state for state in states if state.endswith(_CHANGED)]
    return [*faults, *states]


def check_whole(source: CheckpointSource) -> None:
    """Raise `CheckpointError` for damaged files, with the tensors that this concerns."""
    if source.faults():
        told = "\n".join(all_faults(source))
        raise CheckpointError(f"Damaged; use another checkpoint:\n{told}")


def differences(
    first: CheckpointSource,
    second: CheckpointSource,
    states: Sequence[str] = STATES,
    on_progress: Progress | None = None,
) -> Iterator[Difference]:
    """State by state, in the first one's order; then what only the second has."""
    theirs = second.manifest.parameters
    for name, record in first.manifest.parameters.items():
        for state in (s for s in states_of(first, name) if s in states):
            if name not in theirs or state not in theirs[name].states:
                yield Difference(name, state, "missing")
            elif theirs[name].shape != record.shape:
                yield Difference(name, state, "shape")
            else:
                yield _difference(first, second, name, state, on_progress)
    for name in theirs:
        ours = first.manifest.parameters.get(name)
        for state in (s for s in states_of(second, name) if s in states):
            if ours is None or state not in ours.states:
                yield Difference(name, state, "added")


def absent_states(found: Sequence[Difference]) -> dict[tuple[str, str], int]:
    """(state, kind) of what only one checkpoint has, of any parameter, and how many: moments, say."""
    kinds = Counter((d.state, d.kind) for d in found)
    totals = Counter(d.state for d in found)
    return {
        (state, kind): count
        for (state, kind), count in kinds.items()
        if kind in ("missing", "added") and count == totals[state] > 1
    }


def _difference(
    first: CheckpointSource, second: CheckpointSource, name: str, state: str, on_progress: Progress | None
) -> Difference:
    largest, squares, norm, num_differing = 0.0, 0.0, 0.0, 0
    for start, ours in _pieces(first, name, state):
        theirs = second.read(name, state, start, start + ours.numel())
        a, b = ours.double(), theirs.double()
        gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs().nan_to_num(math.inf))
        largest = max(largest, float(gap.max()))
        squares += float(gap.square().sum())
        norm += float(a.nan_to_num().square().sum())
        num_differing += int(gap.count_nonzero())
        if on_progress is not None:
            on_progress(ours.numel() * ours.element_size())
    kind = "differs" if num_differing else "identical"
    relative = math.sqrt(squares / norm) if norm else (math.inf if squares else 0.0)
    return Difference(name, state, kind, largest, relative, num_differing)
