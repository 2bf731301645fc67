"""A process of `gpu_check.py` that runs the cases of one phase, and reports each result as soon as it has it.

The runner starts it early, since imports take seconds, and sends the phase later. Both sides exchange JSON
lines: one request on standard input, messages on standard output. What a case prints goes to standard error.
"""

import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]  # measured values by name, as JSON can hold them
_TRACEBACK_CHARACTERS = 1500


class SkipCase(Exception):
    """The case cannot run here; the message says why."""


class CheckError(Exception):
    """The case ran, and its result is wrong; `values` were measured all the same."""

    def __init__(self, reason: str, **values: Any) -> None:
        super().__init__(reason)
        self.values = values


@dataclass(frozen=True, slots=True)
class Case:
    """One check or measurement. `run` returns what it measured; an exception fails this case only."""

    name: str
    run: Callable[[], Row]
    limit_s: float = 60.0
    labels: Row = field(default_factory=dict)  # fields of its row, also if it fails
    ends_process: bool = False  # what it leaves behind would disturb the next case


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the runner asks of a worker."""

    phase: str
    first_case: int  # the cases before it are done
    case_patterns: Sequence[str]  # globs: the cases to run
    work_dir: str  # for files that later workers need
    dry: bool


Phases: TypeAlias = Mapping[str, Callable[[Request], Sequence[Case]]]
# Called after each case: a reason to go on in a new process, None if this one is as good as new.
NeedsNewProcess: TypeAlias = Callable[[], str | None]


def serve(phases: Phases, needs_new_process: NeedsNewProcess = lambda: None) -> None:
    """Run the phases that the runner requests, one after the other, until it closes standard input."""
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the runner asks where a hung case is

    def send(kind: str, **fields: Any) -> None:
        messages.write(json.dumps({"kind": kind, **fields}) + "\n")

    for line in sys.stdin:
        if not _serve_phase(Request(**json.loads(line)), phases, needs_new_process, send):
            return


def _serve_phase(
    request: Request, phases: Phases, needs_new_process: NeedsNewProcess, send: Callable[..., None]
) -> bool:
    """Run the phase's cases from `first_case` on; return whether this process can run more."""
    cases = [
        case
        for case in phases[request.phase](request)
        if any(fnmatchcase(case.name, pattern) for pattern in request.case_patterns)
    ]
    send("cases", names=[case.name for case in cases])
    reason = None
    for index, case in enumerate(cases):
        if index < request.first_case:
            continue
        send("start", index=index, limit_s=case.limit_s)
        row = run_case(case)
        reason = "this case ends it" if case.ends_process else needs_new_process()
        send("row", row={"case": case.name, **row})
        if reason is not None:
            print(f"a new process goes on, because {reason}", flush=True)
            send("restart")
            return False
    send("done")
    return True


def run_case(case: Case) -> dict[str, Any]:
    """The case's row: its status (ok, skipped, failed), duration and values."""
    print(f"--- {case.name}", flush=True)
    started = time.perf_counter()
    try:
        outcome: dict[str, Any] = {"status": "ok", **case.run()}
    except SkipCase as skip:
        outcome = {"status": "skipped", "reason": str(skip)}
    except CheckError as wrong:
        outcome = {"status": "failed", "reason": str(wrong), **wrong.values}
    except Exception as error:
        traceback.print_exc()
        text = "".join(traceback.format_exception(error))
        reason = f"{type(error).__name__}: {error}"[:_TRACEBACK_CHARACTERS]
        outcome = {"status": "failed", "reason": reason, "traceback": text[-_TRACEBACK_CHARACTERS:]}
    return {**case.labels, **outcome, "seconds": round(time.perf_counter() - started, 2)}
