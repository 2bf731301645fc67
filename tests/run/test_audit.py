"""`distft audit` of runs with a known use of sequences, one of them wrong on purpose."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import RanksError, run_ranks
from support.small_runs import events, pretraining, run, run_until_power_cut

from distft.checkpoint.background import SaveResult
from distft.cli.main import main
from distft.errors import DataError
from distft.run.audit import Audit, audit_events, audit_run
from distft.run.services import RunServices
from distft.topology import BatchPlan, MicroBatch, Topology
from distft.train.loop import Trainer


def _config(data: Path, run_dir: Path) -> dict[str, Any]:
    return pretraining(
        data,
        run_dir,
        train={"max_steps": 12, "log_every_steps": 1},
        checkpoint={"every_steps": 3, "in_background": False},
    )


def test_an_interrupted_and_resumed_run_used_every_sequence_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = _config(data, tmp_path)
    run_until_power_cut(raw, 8)
    stopped, _ = audit_run(str(tmp_path))
    assert (stopped.step, stopped.num_lost_steps, stopped.num_uncommitted_steps) == (6, 0, 2)
    run(Topology(), raw)
    found, unknown = audit_run(str(tmp_path))
    assert unknown == ""
    assert (found.step, found.num_starts, found.world_sizes) == (12, 2, (1, 1))
    assert (found.num_lost_steps, found.num_uncommitted_steps) == (2, 0)
    assert found.num_sequences == 12 * raw["batch"]["global_batch_size"]
    assert found.is_exact
    assert found.uses_per_row is not None
    (use,) = found.uses_per_row
    assert use.name == "data.sources.0"
    assert use.most - use.least <= 1
    capsys.readouterr()
    assert main(["audit", str(tmp_path)]) == 0
    assert "was used exactly once" in capsys.readouterr().out


def test_missing_and_repeated_sequences_are_reported(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = _config(data, tmp_path)
    size = raw["batch"]["global_batch_size"]
    micro_batches = BatchPlan.micro_batches

    def repeat_step_7(plan: BatchPlan, step: int, rank: int) -> list[MicroBatch]:
        return micro_batches(plan, step - 1 if step == 7 else step, rank)

    monkeypatch.setattr(BatchPlan, "micro_batches", repeat_step_7)
    run(Topology(), raw)
    assert main(["audit", str(tmp_path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["repeated"] == [[6 * size, 7 * size]]
    assert found["missing"] == [[7 * size, 8 * size]]


def _start(step: int, world_size: int) -> dict[str, Any]:
    return {"kind": "resume" if step else "start", "step": step, "world_size": world_size}


def _commit(step: int, used: list[list[int]]) -> dict[str, Any]:
    return {"kind": "ledger", "step": step, "sequences_seen": step * 4, "used": used, "used_again": []}


def test_steps_discarded_by_a_failure_do_not_count() -> None:
    told = [
        _start(0, 2),
        _commit(5, [[0, 20]]),
        _commit(10, [[0, 39]]),  # damaged later, so the run went on from step 5
        _start(5, 3),
        _commit(10, [[0, 40]]),
    ]
    assert audit_events(told) == Audit(
        step=10, num_sequences=40, missing=(), repeated=(), num_starts=2, num_lost_steps=5, world_sizes=(2, 3)
    )
    assert audit_events(told[:3]).missing == ((39, 40),)


def test_steps_that_overlapping_starts_both_did_count_as_done_again() -> None:
    def of(name: str, event: dict[str, Any]) -> dict[str, Any]:
        return {**event, "start_id": name}

    told = [
        of("old", _start(0, 2)),
        of("old", _commit(5, [[0, 20]])),
        of("new", {**_start(5, 1), "discarded_steps": 2}),  # the old one, suspended, has logged step 7
        of("new", _commit(10, [[0, 40]])),
        of("old", {"kind": "ledger", "step": 8, "sequences_seen": 32, "used": [[0, 9]], "used_again": []}),
        of("old", {"kind": "finish", "step": 9}),
    ]
    found = audit_events(told)
    assert (found.step, found.num_lost_steps, found.is_exact, found.world_sizes) == (10, 4, True, (2, 1))
    assert audit_events(told[:4]).num_lost_steps == 2
    assert audit_events([*told, {"kind": "fault", "step": 12}]).num_uncommitted_steps == 2


def _die_after_a_commit(topology: Topology, raw: dict[str, Any]) -> None:
    """Train, and be killed between the manifest of step 6 and the event that tells of it."""
    log_commit = RunServices._log_commit

    def log_or_die(services: RunServices, saved: SaveResult) -> None:
        if saved.step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        log_commit(services, saved)

    pytest.MonkeyPatch().setattr(RunServices, "_log_commit", log_or_die)
    run(topology, raw)


@pytest.mark.ranks
def test_a_commit_that_no_event_tells_of_counts(data: Path, tmp_path: Path) -> None:
    raw = _config(data, tmp_path)
    with pytest.raises(RanksError, match="SIGKILL"):
        run_ranks(_die_after_a_commit, 1, raw)
    killed, _ = audit_run(str(tmp_path))
    assert (killed.step, killed.num_lost_steps, killed.num_uncommitted_steps) == (6, 0, 0)
    assert killed.is_exact
    run(Topology(), raw)
    found, _ = audit_run(str(tmp_path))
    assert (found.step, found.num_lost_steps, found.is_exact) == (12, 0, True)


@pytest.mark.ranks
def test_the_steps_that_a_killed_run_logged_count_as_done_again(data: Path, tmp_path: Path) -> None:
    raw = _config(data, tmp_path)
    with pytest.raises(RanksError, match="SIGKILL"):
        run_ranks(_die_after_step, 1, raw, 8)
    run(Topology(), raw)
    assert audit_run(str(tmp_path))[0].num_lost_steps == 2


def _die_after_step(topology: Topology, raw: dict[str, Any], last_step: int) -> None:
    run_step = Trainer._run_step

    def run_step_or_die(trainer: Trainer, *arguments: Any) -> Any:
        if trainer.step == last_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return run_step(trainer, *arguments)

    pytest.MonkeyPatch().setattr(Trainer, "_run_step", run_step_or_die)
    run(topology, raw)


def test_a_save_in_the_background_is_told_while_training_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    run_step = Trainer._run_step

    def wait_for_event_before_step_7(trainer: Trainer, *arguments: Any) -> Any:
        while trainer.step == 6 and not told:  # in the old order the event came with the save of step 8
            told.extend(event["step"] for event in events(tmp_path) if event["kind"] == "save")
        return run_step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "_run_step", wait_for_event_before_step_7)
    run(Topology(), pretraining(data, tmp_path, checkpoint={"every_steps": 4}))
    assert told == [4]


def test_a_directory_without_events_cannot_be_audited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(tmp_path)]) == 2
    assert "events.jsonl" in capsys.readouterr().err


def test_a_run_without_a_commit_cannot_be_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps(_start(0, 1)) + "\n")
    assert main(["audit", str(tmp_path)]) == 2
    assert "Nothing to audit" in capsys.readouterr().err


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "start", "step": "x", "world_size": 1},
        {"kind": "start", "step": 0, "world_size": []},
        {"kind": "start", "step": 1.5, "world_size": 1},
        {"kind": "resume", "step": -1, "world_size": 1},
    ],
)
def test_a_damaged_event_is_named(event: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="which distft does not write"):
        audit_events([event])
