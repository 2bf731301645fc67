"""Which sequences of the run's order were used, as intervals, so that an audit can check them."""

from collections.abc import Iterable

from distft.topology import MicroBatch

Intervals = tuple[tuple[int, int], ...]  # [start, stop), ascending, with gaps between them


def merge_intervals(intervals: Iterable[tuple[int, int]]) -> tuple[Intervals, Intervals]:
    """The union of `intervals`, and the numbers that are in more than one of them."""
    union: list[tuple[int, int]] = []
    repeated: list[tuple[int, int]] = []
    for start, stop in sorted(intervals):
        if start >= stop:
            continue
        if not union or start > union[-1][1]:
            union.append((start, stop))
            continue
        last_start, last_stop = union[-1]
        if start < last_stop:
            repeated.append((start, min(stop, last_stop)))
        union[-1] = last_start, max(last_stop, stop)
    return tuple(union), merge_intervals(repeated)[0] if repeated else ()


class SequenceLedger:
    """The sequences that one rank used since the last `take`."""

    def __init__(self) -> None:
        self._intervals: list[tuple[int, int]] = []

    def add(self, used: MicroBatch) -> None:
        """Record a micro-batch's sequences; adjacent ones become one interval."""
        if not len(used):
            return
        if self._intervals and self._intervals[-1][1] == used.start:
            self._intervals[-1] = self._intervals[-1][0], used.stop
        else:
            self._intervals.append((used.start, used.stop))

    def take(self) -> list[tuple[int, int]]:
        """The recorded intervals; the ledger is empty afterwards."""
        taken, self._intervals = self._intervals, []
        return taken
