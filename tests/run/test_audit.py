"""`distft audit` of runs with a known use of sequences, one of them wrong on purpose."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import pretraining, run, run_until_power_cut

from distft.cli.main import main
from distft.run.audit import Audit, audit_events, audit_run
from distft.topology import BatchPlan, MicroBatch, Topology


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
    run(Topology(), raw)
    found, unknown = audit_run(str(tmp_path))
    assert unknown == ""
    assert (found.step, found.num_starts, found.world_sizes) == (12, 2, (1, 1))
    assert found.num_sequences == 12 * raw["batch"]["global_batch_size"]
    assert found.is_exact
    assert found.uses_per_row is not None
    least, most = found.uses_per_row
    assert most - least <= 1
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
    events = [
        _start(0, 2),
        _commit(5, [[0, 20]]),
        _commit(10, [[0, 39]]),  # damaged later, so the run went on from step 5
        _start(5, 3),
        _commit(10, [[0, 40]]),
    ]
    assert audit_events(events) == Audit(
        step=10, num_sequences=40, missing=(), repeated=(), num_starts=2, num_lost_steps=5, world_sizes=(2, 3)
    )
    assert audit_events(events[:3]).missing == ((39, 40),)


def test_a_directory_without_events_cannot_be_audited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(tmp_path)]) == 2
    assert "events.jsonl" in capsys.readouterr().err


def test_a_run_without_a_commit_cannot_be_audited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.jsonl").write_text(json.dumps(_start(0, 1)) + "\n")
    assert main(["audit", str(tmp_path)]) == 2
    assert "Nothing to audit" in capsys.readouterr().err
