"""Finds hung ranks from the times since their last heartbeats. Arithmetic only: no clock, no network."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from distft.watch.heartbeat import Heartbeat, Phase

# In these phases all ranks do the same work. In others, such as loading or committing a checkpoint, one rank
# may be busy for long while the rest wait.
_PHASES_IN_STEP: frozenset[Phase] = frozenset({"data", "forward", "backward and update", "after the step"})

# The start and the end of the first line about a hung rank; distft.cluster.driver.failures matches them.
HUNG_RANK = re.compile(r"rank \d+ \(")
STACK_FOLLOWS = "; its Python stack was:"
Reason = Literal["silent", "unreachable", "behind", "device"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LastSeen:
    """The last heartbeat of a rank, and the time since."""

    heartbeat: Heartbeat
    silent_s: float = 0.0  # since the last new heartbeat
    unmoved_s: float = 0.0  # since the last heartbeat with a new position

    def advanced(self, elapsed_s: float) -> "LastSeen":
        return replace(self, silent_s=self.silent_s + elapsed_s, unmoved_s=self.unmoved_s + elapsed_s)

    def updated(self, heartbeat: Heartbeat) -> "LastSeen":
        """With the heartbeat that the store has now; it may be the same one."""
        return LastSeen(
            heartbeat=heartbeat,
            silent_s=self.silent_s if heartbeat.number == self.heartbeat.number else 0.0,
            unmoved_s=self.unmoved_s if heartbeat.position == self.heartbeat.position else 0.0,
        )

    @property
    def has_ended(self) -> bool:
        return self.heartbeat.phase == "end"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """Ranks that hang, and the symptom."""

    reason: Reason
    ranks: tuple[int, ...]


def find_hang(
    last_seen: Mapping[int, LastSeen], *, observer: int, hang_timeout_s: float, sees_all: bool
) -> Hang | None:
    """The hang that `observer` finds; `last_seen` includes its own heartbeat, as read back from the store.

    - "unreachable": the observer's own heartbeats do not come back: the store, which rank 0 serves, is lost.
    - "silent": a rank's heartbeats stop. Its process is stopped, or its node is gone.
    - "behind": a rank's heartbeats go on, but it does not reach the phase in which the others wait. Only an
      observer that sees all ranks reports this, for phases of a step, and after every rank's first step,
      which may take any time.
    - "device": the same of a single rank, whose GPU does not finish what its host has enqueued. Its host may
      stand still: in a debugger, or to compile.
    """
    running = {rank: seen for rank, seen in last_seen.items() if not seen.has_ended}
    own = running.pop(observer, None)
    if own is not None and own.silent_s >= hang_timeout_s:
        return Hang(reason="unreachable", ranks=(0,)) if 0 in running else None
    silent = tuple(rank for rank, seen in running.items() if seen.silent_s >= hang_timeout_s)
    if silent:
        return Hang(reason="silent", ranks=silent)
    if own is None or not sees_all:
        return None
    if len(last_seen) == 1:
        stands_still = own.heartbeat.device and _stands_still_in_step(own, hang_timeout_s)
        return Hang(reason="device", ranks=(observer,)) if stands_still else None
    behind = _ranks_behind({**running, observer: own}, hang_timeout_s)
    return Hang(reason="behind", ranks=behind) if behind and observer not in behind else None


def _ranks_behind(running: Mapping[int, LastSeen], hang_timeout_s: float) -> tuple[int, ...]:
    if any(seen.heartbeat.work.num_steps == 0 for seen in running.values()):
        return ()
    last = min(seen.heartbeat.position for seen in running.values())
    behind = {
        rank: seen
        for rank, seen in running.items()
        if seen.heartbeat.position == last and not seen.heartbeat.is_waiting
    }
    is_certain = all(_stands_still_in_step(seen, hang_timeout_s) for seen in behind.values())
    return tuple(sorted(behind)) if is_certain and len(behind) < len(running) else ()


def _stands_still_in_step(seen: LastSeen, hang_timeout_s: float) -> bool:
    return (
        seen.heartbeat.work.num_steps > 0
        and seen.unmoved_s >= hang_timeout_s
        and seen.silent_s <= hang_timeout_s / 3  # else it may soon be silent, a more exact finding
        and seen.heartbeat.phase in _PHASES_IN_STEP
    )


def describe_hang(hang: Hang, last_seen: Mapping[int, LastSeen], processes: Mapping[int, str]) -> str:
    """For each hung rank: since when, in which phase, and its stack. `processes`: host and pid by rank."""
    return "\n".join(
        describe_hang_event(hang_event(hang.reason, rank, last_seen[rank]), processes[rank])
        for rank in hang.ranks
    )


def hang_event(reason: Reason, rank: int, seen: LastSeen) -> dict[str, Any]:
    """The fields of one hung rank's event in `events.jsonl`."""
    return {
        "rank": rank,
        "reason": reason,
        "step": seen.heartbeat.step,
        "phase": seen.heartbeat.phase,
        "device": seen.heartbeat.device,
        "silent_s": round(seen.silent_s, 1),
        "unmoved_s": round(seen.unmoved_s, 1),
        "stack": seen.heartbeat.frames,
    }


def describe_hang_event(event: Mapping[str, Any], process: str) -> str:
    """The event as a message: one line, then the stack. `process`: host and pid."""
    if event["reason"] == "behind":
        symptom = f"stands still for {event['unmoved_s']:.1f} s while the other ranks wait for it"
    elif event["reason"] == "device":
        symptom = f"stands still for {event['unmoved_s']:.1f} s"
    else:
        symptom = f"has not answered for {event['silent_s']:.1f} s"
    store = ", or the store that it or its launcher serves" if event["reason"] == "unreachable" else ""
    where = f"in step {event['step']}, {event['phase']}" if event["step"] else "before its first step"
    device = f", its GPU in {event['device']}" if event.get("device") else ""
    lines = [f"rank {event['rank']} ({process}){store} {symptom}, {where}{device}{STACK_FOLLOWS}"]
    return "\n  ".join([*lines, *event["stack"]])
