"""The GPU check runs on a CPU in a tiny size, and survives what its cases do, so no GPU minute is lost."""

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_check import PHASES
from gpu_check_memory import MemoryPlan, largest_micro_batch
from gpu_check_parity import require_equal
from gpu_check_runner import Phase, Runner
from gpu_check_speed import MODELS
from gpu_check_summary import summarise
from gpu_check_worker import CheckError
from support.commands import call_python
from support.engine_scenarios import Scenario, run_alone

TOOLS = Path(__file__).resolve().parent.parent / "tools"
# What a CPU really lacks: all other cases have to run.
LACKING = (
    "refused on a CPU: model.attention_kernel=",  # kernels that exist for CUDA alone
    "torch has no efficient kernel",
    "torch has no cudnn kernel",
    "DeepSpeed has no fp16 on a CPU",
    "a dry run compiles only one",
    "transformers is not installed",
)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_a_dry_run_writes_the_rows_of_every_phase(tmp_path: Path) -> None:
    command = (TOOLS / "gpu_check.py", "--dry", "--out", tmp_path)
    done = call_python(*command, env=os.environ, cwd=tmp_path, timeout_s=880)
    rows = _read_rows(tmp_path / "rows.jsonl")
    assert [row for row in rows if row["status"] not in {"ok", "skipped"}] == []
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(dict.fromkeys(row["phase"] for row in rows)) == ["about", *(phase.name for phase in PHASES)]
    assert [row for row in rows if row["status"] == "skipped" and not row["reason"].startswith(LACKING)] == []
    ok = [row for row in rows if row["status"] == "ok"]
    assert {row["phase"] for row in ok} == {row["phase"] for row in rows}
    compared = [row for row in ok if row["phase"] in {"parity", "parity-compiled"}]
    assert len(compared) > 30
    assert all(row["max_difference"] < row["tolerance"] for row in compared)
    assert all(row["tokens_per_s"] > 0 and row["mfu"] > 0 for row in ok if row["phase"] == "speed")
    local = [row for row in ok if row["phase"] == "sync" and row["case"].startswith("local")]
    assert {row["waits_per_step"] for row in local} == {0}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"rows.jsonl", "summary.md", "kernels.jsonl", "log.txt"}
    assert _read_rows(tmp_path / "kernels.jsonl")[0]["total_us"] > 0
    summary = (tmp_path / "summary.md").read_text()
    assert "| tiny distft local bf16 eager |" in summary
    assert "### Failed" not in summary


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


WORKER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(TOOLS)!r})
from gpu_check_worker import Case, CheckError, SkipCase, serve

def fails(error):
    raise error

def hangs():
    time.sleep(1000)

def dies():
    os.kill(os.getpid(), signal.SIGKILL)

def value():
    print("noise on standard output")
    return {{"pid": os.getpid()}}

def broken(request):
    raise ImportError("no such module")

def after_first_case(request):
    return [Case("a", value, ends_process=True), Case("b", value)]

serve({{
    "raises": lambda request: [
        Case("raises", lambda: fails(ZeroDivisionError("by zero")), labels={{"precision": "bf16"}}),
        Case("wrong", lambda: fails(CheckError("too far", max_difference=3))),
        Case("skips", lambda: fails(SkipCase("no such kernel"))),
        Case("works", value),
    ],
    "hangs": lambda request: [Case("hangs", hangs, limit_s=0.5), Case("works", value)],
    "dies": lambda request: [Case("works", value), Case("dies", dies), Case("works too", value)],
    "broken": broken,
    "long": lambda request: [Case("a", lambda: time.sleep(0.2) or {{}}), Case("b", hangs), Case("c", value)],
    "replaced": after_first_case,
    "last": lambda request: [Case("works", value)],
}})
"""


class Check:
    """A runner over the worker above, and the rows that it emitted."""

    def __init__(self, directory: Path, budget_s: float = 60) -> None:
        script = directory / "worker.py"
        script.write_text(textwrap.dedent(WORKER))
        self.rows: list[dict[str, Any]] = []
        self._runner = Runner(
            [sys.executable, str(script)], work_dir=directory, budget_s=budget_s, emit=self.rows.append
        )

    def run(self, *phases: Phase) -> list[tuple[str, str]]:
        """Case and status of each row."""
        try:
            for phase in phases:
                self._runner.run(phase)
        finally:
            self._runner.close()
        return [(row["case"], row["status"]) for row in self.rows]


def test_a_case_that_raises_costs_only_itself(tmp_path: Path) -> None:
    check = Check(tmp_path)
    assert check.run(Phase("raises", 30), Phase("last", 30)) == [
        ("raises", "failed"),
        ("wrong", "failed"),
        ("skips", "skipped"),
        ("works", "ok"),
        ("works", "ok"),
    ]
    raised, wrong, skipped, first, last = check.rows
    assert raised["reason"] == "ZeroDivisionError: by zero"
    assert "fails(ZeroDivisionError" in raised["traceback"]
    assert raised["precision"] == "bf16"
    assert wrong["max_difference"] == 3
    assert skipped["reason"] == "no such kernel"
    assert first["pid"] == last["pid"]  # a healthy process goes on


def test_a_hanging_case_is_ended_with_its_stack_and_the_next_one_runs(tmp_path: Path) -> None:
    check = Check(tmp_path)
    assert check.run(Phase("hangs", 30)) == [("hangs", "hung"), ("works", "ok")]
    assert "in hangs" in check.rows[0]["log"]


def test_a_process_that_is_killed_costs_only_the_case_that_it_ran(tmp_path: Path) -> None:
    check = Check(tmp_path)
    assert check.run(Phase("dies", 30), Phase("last", 30)) == [
        ("works", "ok"),
        ("dies", "died"),
        ("works too", "ok"),
        ("works", "ok"),
    ]
    assert "exit code -9" in check.rows[1]["reason"]
    assert check.rows[0]["pid"] != check.rows[2]["pid"]


def test_a_phase_that_cannot_start_is_one_row_with_the_reason(tmp_path: Path) -> None:
    check = Check(tmp_path)
    assert check.run(Phase("broken", 30), Phase("last", 30)) == [("*", "died"), ("works", "ok")]
    assert "no such module" in check.rows[0]["log"]


def test_a_phase_ends_at_its_limit_and_names_what_it_did_not_run(tmp_path: Path) -> None:
    check = Check(tmp_path)
    found = check.run(Phase("long", 2.0), Phase("last", 30))
    assert found == [("a", "ok"), ("b", "skipped"), ("c", "skipped"), ("works", "ok")]


def test_phases_beyond_the_budget_are_skipped_with_the_reason(tmp_path: Path) -> None:
    check = Check(tmp_path, budget_s=1.0)
    assert check.run(Phase("last", 30)) == [("*", "skipped")]
    assert "of the budget were left" in check.rows[0]["reason"]


@pytest.mark.parametrize("starts_fresh", [False, True])
def test_a_case_or_a_phase_may_ask_for_a_new_process(tmp_path: Path, starts_fresh: bool) -> None:
    check = Check(tmp_path)
    assert check.run(Phase("replaced", 30), Phase("last", 30, starts_fresh)) == [
        ("a", "ok"),
        ("b", "ok"),
        ("works", "ok"),
    ]
    first, second, third = (row["pid"] for row in check.rows)
    assert first != second
    assert (second != third) == starts_fresh


@pytest.mark.parametrize("losses", [[3.0, 2.1], [3.0, float("nan")]])
def test_losses_that_are_too_far_from_the_reference_fail(losses: Sequence[float]) -> None:
    assert require_equal([3.0, 2.0], [3.0, 2.05], 0.1)["max_difference"] == 0.05
    with pytest.raises(CheckError, match=r"more than 0\.01"):
        require_equal(losses, [3.0, 2.0], 0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_predicted_memory_of_the_states_is_what_the_engine_holds(precision: str) -> None:
    scenario = Scenario(precision=precision)
    training = run_alone(scenario, 1)
    weights = list(training.engine.module.parameters())
    states = [fragment.values for fragment in training.engine.fragments() if fragment.state != "ema"]
    storages = [tensor.untyped_storage() for tensor in weights + states]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    gradients = 4 * sum(weight.numel() for weight in weights)  # fp32, freed after each step
    plan = MemoryPlan(model=scenario.model, precision=precision, micro_batch_size=2, seq_len=12)
    assert plan.state_bytes() == sum(held.values()) + gradients


def test_a_micro_batch_is_halved_until_it_fits() -> None:
    plan = MemoryPlan(model=MODELS["1.3B"], precision="bf16", micro_batch_size=64, seq_len=2048)
    assert largest_micro_batch(plan, 1e12) == 64
    chosen = largest_micro_batch(plan, 80e9)
    assert replace(plan, micro_batch_size=chosen).predicted_bytes() <= 80e9
    assert replace(plan, micro_batch_size=2 * chosen).predicted_bytes() > 80e9
    assert replace(plan, checkpointing="full").predicted_bytes() < plan.predicted_bytes() / 2


def test_the_summary_names_failures_and_ratios() -> None:
    speed = {"phase": "speed", "model": "1.3B", "status": "ok", "tokens_per_s": 100}
    rows = [
        {"phase": "about", "case": "*", "status": "ok", "card": "a card", "commit": "abc"},
        {**speed, "case": "1.3B distft local bf16 compiled"},
        {**speed, "case": "1.3B distft local bf16 compiled fp8 tensorwise", "tokens_per_s": 120},
        {"phase": "parity", "case": "zero 3", "status": "hung", "reason": "it did not\nend"},
    ]
    summary = summarise(rows)
    assert "card a card, commit abc" in summary
    assert "- parity / zero 3 (hung): it did not end" in summary
    assert "| 1.3B distft local bf16 compiled fp8 tensorwise | 1.200 |" in summary
