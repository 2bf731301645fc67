"""Which sequences of the run's order were used, as intervals: what an audit can be held against."""

from collections.abc import Iterable

from distft.topology import MicroBatch

Intervals = tuple[tuple[int, int], ...]  # [start, stop), ascending, apart from each other


def merged(intervals: Iterable[tuple[int, int]]) -> tuple[Intervals, Intervals]:
    """The union of `intervals`, and what more than one of them holds."""
    union: list[tuple[int, int]] = []
    repeated: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if start >= stop:
            continue
        if not union or start > union[-1][1]:
            union.append((start, stop))
            continue
        begin, end = union[-1]
        if start < end:
            repeated.append((start, min(stop, end)))
        union[-1] = begin, max(end, stop)
    return tuple(union), merged(repeated)[0] if repeated else ()


class Ledger:
    """What one rank used since it was last asked."""

    def __init__(self) -> None:
        self._intervals: list[tuple[int, int]] = []

    def add(self, used: MicroBatch) -> None:
        """Note the sequences of a micro-batch; neighbours become one interval."""
        if not len(used):
            return
        if self._intervals and self._intervals[-1][1] == used.start:
            self._intervals[-1] = self._intervals[-1][0], used.stop
        else:
            self._intervals.append((used.start, used.stop))

    def take(self) -> list[tuple[int, int]]:
        """All of it; the ledger is empty afterwards."""
        taken, self._intervals = self._intervals, []
        return taken
