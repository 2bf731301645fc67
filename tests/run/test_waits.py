"""Steps of whole runs wait for the device only where they log."""

from pathlib import Path
from typing import Any

import pytest
from support.count_waits import CountWaits
from support.small_runs import fine_tuning, pretraining, run

from distft.topology import Topology
from distft.train.loop import Trainer


def _waits_of_run(raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """Train; the waits in each step, from its data on to the last thing before its signals are heard."""
    waits: dict[int, list[str]] = {}
    run_step = Trainer._run_step

    def run_and_count(trainer: Trainer, *arguments: Any) -> Any:
        with CountWaits() as counter:
            result = run_step(trainer, *arguments)
        waits[trainer.step] = counter.found
        return result

    monkeypatch.setattr(Trainer, "_run_step", run_and_count)
    run(Topology(), raw)
    return waits


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_of_a_whole_run_waits_only_where_it_logs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    raw = pretraining(
        data,
        tmp_path,
        train={"max_steps": 4, "log_every_steps": 4},
        engine={"type": "local", "param_dtype": precision},
    )
    raw["model"]["dropout"] = 0.1
    waits = _waits_of_run(raw, monkeypatch)
    assert [step for step, found in waits.items() if found] == [4]
    assert len(waits) == 4


def test_a_step_of_a_contrastive_run_waits_only_where_it_logs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = pretraining(
        data,
        tmp_path,
        tokenizer=str(data / "tokenizer.model"),
        objective={"type": "contrastive", "views": "dropout", "learns_temperature": True},
        data={"type": "pairs", "path": str(data / "train.jsonl"), "text": "text", "positive": None},
        validation=None,
        train={"max_steps": 3, "log_every_steps": 3},
    )
    raw["model"] |= {"dropout": 0.1, "attention": "bidirectional"}
    waits = _waits_of_run(raw, monkeypatch)
    assert [step for step, found in waits.items() if found] == [3]


def test_a_step_of_a_fine_tune_waits_only_where_it_logs(
    data: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = fine_tuning(data, tmp_path, pretrained, train={"max_steps": 3, "log_every_steps": 3})
    waits = _waits_of_run(raw, monkeypatch)
    assert [step for step, found in waits.items() if found] == [3]
