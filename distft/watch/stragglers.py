"""Who is slow, by the ranks' own work. Arithmetic only."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from distft.watch.pulse import Work

_SLOW = 1.5  # times the median of the others
_LEAST_EXCESS_S = 0.005  # a step; less is the jitter of a busy machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """A rank whose own work takes longer than that of the others."""

    rank: int
    own_s: float  # of own work, each step
    others_own_s: float  # the median of the other ranks


def find_stragglers(before: Mapping[int, Work], now: Mapping[int, Work]) -> list[Straggler]:
    """Ranks that took over 1.5 times the median of the others from `before` to `now`.

    By the step and by the token: a rank with the larger share of a batch that does not divide is not slow,
    and neither is one whose share is so small that what every step costs weighs more.
    """
    done = {
        rank: Work(
            num_steps=work.num_steps - before[rank].num_steps,
            num_tokens=work.num_tokens - before[rank].num_tokens,
            seconds=work.seconds - before[rank].seconds,
        )
        for rank, work in now.items()
    }
    if len(done) < 2 or any(work.num_steps < 1 or work.num_tokens < 1 for work in done.values()):
        return []
    found = []
    for rank, work in done.items():
        others = [other for place, other in done.items() if place != rank]
        own_s = work.seconds / work.num_steps
        others_own_s = median(other.seconds / other.num_steps for other in others)
        by_token = work.seconds / work.num_tokens
        others_by_token = median(other.seconds / other.num_tokens for other in others)
        is_slow = own_s > _SLOW * others_own_s and by_token > _SLOW * others_by_token
        if is_slow and own_s - others_own_s > _LEAST_EXCESS_S:
            found.append(Straggler(rank=rank, own_s=own_s, others_own_s=others_own_s))
    return found


class StragglerWatch:
    """Compares interval after interval, and tells of each rank once in a while."""

    def __init__(self, *, interval_steps: int, quiet_s: float = 300.0) -> None:
        self._interval_steps = interval_steps
        self._quiet_s = quiet_s
        self._before: dict[int, Work] = {}
        self._told_at: dict[int, float] = {}

    def look(self, works: Mapping[int, Work], now_s: float) -> list[Straggler]:
        """Who was slow over an interval that ended by now; the first step, which may compile, is left out."""
        if not self._before:
            if all(work.num_steps for work in works.values()):
                self._before = dict(works)
            return []
        if any(
            work.num_steps - self._before[r].num_steps < self._interval_steps for r, work in works.items()
        ):
            return []
        found = find_stragglers(self._before, works)
        self._before = dict(works)
        fresh = [s for s in found if now_s - self._told_at.get(s.rank, float("-inf")) >= self._quiet_s]
        self._told_at.update((s.rank, now_s) for s in fresh)
        return fresh
