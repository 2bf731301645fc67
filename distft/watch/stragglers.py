"""Finds slow ranks by the time that they spend on their own work. Arithmetic only."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from distft.watch.heartbeat import OwnWork

_SLOWDOWN = 1.5  # times the median of the other ranks
_MIN_EXCESS_S = 0.005  # per step; less is the jitter of a busy machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """A rank whose own work takes longer than that of the others."""

    rank: int
    own_s: float  # own work per step
    others_own_s: float  # the median of the other ranks


def find_stragglers(before: Mapping[int, OwnWork], now: Mapping[int, OwnWork]) -> list[Straggler]:
    """Ranks that took over 1.5 times the median of the others from `before` to `now`.

    Both per step and per token: a rank with a larger share of the batch is not slow per token, and a rank
    with so small a share that the fixed cost of a step dominates is not slow per step.
    """
    interval = {
        rank: OwnWork(
            num_steps=work.num_steps - before[rank].num_steps,
            num_tokens=work.num_tokens - before[rank].num_tokens,
            seconds=work.seconds - before[rank].seconds,
        )
        for rank, work in now.items()
    }
    if len(interval) < 2 or any(work.num_steps < 1 or work.num_tokens < 1 for work in interval.values()):
        return []
    found = []
    for rank, work in interval.items():
        others = [other for other_rank, other in interval.items() if other_rank != rank]
        own_s = work.seconds / work.num_steps
        others_own_s = median(other.seconds / other.num_steps for other in others)
        s_per_token = work.seconds / work.num_tokens
        others_s_per_token = median(other.seconds / other.num_tokens for other in others)
        is_slow = own_s > _SLOWDOWN * others_own_s and s_per_token > _SLOWDOWN * others_s_per_token
        if is_slow and own_s - others_own_s > _MIN_EXCESS_S:
            found.append(Straggler(rank=rank, own_s=own_s, others_own_s=others_own_s))
    return found


class StragglerDetector:
    """Compares ranks over intervals of `interval_steps`; reports a rank at most once every `quiet_s`."""

    def __init__(self, *, interval_steps: int, quiet_s: float = 300.0) -> None:
        self._interval_steps = interval_steps
        self._quiet_s = quiet_s
        self._interval_start: dict[int, OwnWork] = {}
        self._reported_at: dict[int, float] = {}

    def update(self, works: Mapping[int, OwnWork], now_s: float) -> list[Straggler]:
        """New stragglers once `works` completes an interval. The first step is excluded: it may compile."""
        if not self._interval_start:
            if all(work.num_steps for work in works.values()):
                self._interval_start = dict(works)
            return []
        if any(
            work.num_steps - self._interval_start[rank].num_steps < self._interval_steps
            for rank, work in works.items()
        ):
            return []
        found = find_stragglers(self._interval_start, works)
        self._interval_start = dict(works)
        new = [s for s in found if now_s - self._reported_at.get(s.rank, float("-inf")) >= self._quiet_s]
        self._reported_at.update((s.rank, now_s) for s in new)
        return new
