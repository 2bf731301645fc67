"""Who hangs, by what was heard of the ranks. Arithmetic only: no clock, no network."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from distft.watch.pulse import Beat, Phase

# Ranks do the same things here, and none of them waits for one alone. Elsewhere one rank may rightly be
# busy for long while the others wait: reading a checkpoint, writing a manifest.
_IN_STEP: frozenset[Phase] = frozenset({"data", "forward", "backward and update", "after the step"})

HANG = "hang"  # the kind of an event
STACK_FOLLOWS = "; its Python stack was:"
Reason = Literal["silent", "unreachable", "behind"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """The last that was heard of a rank, and how long ago."""

    beat: Beat
    silent_s: float = 0.0  # since its last beat came
    unmoved_s: float = 0.0  # since it was last seen to enter a phase

    def later(self, elapsed_s: float) -> "Sighting":
        return replace(self, silent_s=self.silent_s + elapsed_s, unmoved_s=self.unmoved_s + elapsed_s)

    def updated(self, beat: Beat) -> "Sighting":
        """With the beat that is to be heard now, which may be the same as before."""
        return Sighting(
            beat=beat,
            silent_s=self.silent_s if beat.number == self.beat.number else 0.0,
            unmoved_s=self.unmoved_s if beat.position == self.beat.position else 0.0,
        )

    @property
    def has_ended(self) -> bool:
        return self.beat.phase == "end"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """Ranks that hang, and how that shows."""

    reason: Reason
    ranks: tuple[int, ...]


def find_hang(
    sightings: Mapping[int, Sighting], *, observer: int, hang_timeout_s: float, sees_all: bool
) -> Hang | None:
    """What `observer` makes of its sightings, its own beat among them as the store gave it back.

    A rank is silent when its beats stop: its process is stopped, or its node is gone. If not even the
    observer's own beats come back, the store cannot be reached, which rank 0 serves. A rank is behind when it
    beats, but does not come to where the others wait for it; that is told only by one that sees all ranks,
    of ranks within a step, and not before each has made its first, which may take any time.
    """
    there = {rank: seen for rank, seen in sightings.items() if not seen.has_ended}
    own = there.pop(observer, None)
    if own is not None and own.silent_s >= hang_timeout_s:
        return Hang(reason="unreachable", ranks=(0,)) if 0 in there else None
    silent = tuple(rank for rank, seen in there.items() if seen.silent_s >= hang_timeout_s)
    if silent:
        return Hang(reason="silent", ranks=silent)
    if own is None or not sees_all:
        return None
    behind = _behind({**there, observer: own}, hang_timeout_s)
    return Hang(reason="behind", ranks=behind) if behind and observer not in behind else None


def _behind(there: Mapping[int, Sighting], hang_timeout_s: float) -> tuple[int, ...]:
    if any(seen.beat.work.num_steps == 0 for seen in there.values()):
        return ()
    last = min(seen.beat.position for seen in there.values())
    behind = {rank: s for rank, s in there.items() if s.beat.position == last and not s.beat.is_waiting}
    is_certain = all(
        s.unmoved_s >= hang_timeout_s
        and s.silent_s <= hang_timeout_s / 3  # else it may soon be found silent, which says more
        and s.beat.phase in _IN_STEP
        for s in behind.values()
    )
    return tuple(sorted(behind)) if is_certain and len(behind) < len(there) else ()


def explain(hang: Hang, sightings: Mapping[int, Sighting], places: Mapping[int, str]) -> str:
    """For the user: each rank that hangs, since when, in what, and where it stood; `places`: host and pid."""
    return "\n".join(
        explain_event(as_event(hang.reason, rank, sightings[rank]), places[rank]) for rank in hang.ranks
    )


def as_event(reason: Reason, rank: int, seen: Sighting) -> dict[str, Any]:
    """What `events.jsonl` keeps of a rank that hangs."""
    return {
        "rank": rank,
        "reason": reason,
        "step": seen.beat.step,
        "phase": seen.beat.phase,
        "silent_s": round(seen.silent_s, 1),
        "unmoved_s": round(seen.unmoved_s, 1),
        "stack": seen.beat.frames,
    }


def explain_event(event: Mapping[str, Any], place: str) -> str:
    """The same for the user; the first line ends where the stack begins."""
    if event["reason"] == "behind":
        what = f"stands still for {event['unmoved_s']:.1f} s while the other ranks wait for it"
    else:
        what = f"has not answered for {event['silent_s']:.1f} s"
    store = ", or the store that it or its launcher serves" if event["reason"] == "unreachable" else ""
    where = f"in step {event['step']}, {event['phase']}" if event["step"] else "before its first step"
    lines = [f"rank {event['rank']} ({place}){store} {what}, {where}{STACK_FOLLOWS}"]
    return "\n  ".join([*lines, *event["stack"]])
