"""Stop requests are heard at the next step, whatever the logging interval; empty batches; moved data."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import run_ranks
from support.small_runs import events, fine_tuning, logged, pretraining, run

from distft.checkpoint.manifest import Manifest
from distft.config import parse
from distft.data.packing import PackedRows
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import ConfigError, Interrupted, Preempted
from distft.run.audit import audit_run
from distft.run.config import RunConfig
from distft.run.resume import changed_settings, require_resumable
from distft.run.stop_signals import stop_on_signals
from distft.run.train import run_training
from distft.topology import Topology
from distft.train.loop import Trainer
from distft.train.services import never_stop

SPARSE_LOG = {"max_steps": 12, "log_every_steps": 100}


def _stop_after_calls(topology: Topology, raw: dict[str, Any], num_calls: int) -> int:
    """Train until rank 1 requests a stop in its `num_calls`-th step; the step at which this rank stopped."""
    calls = {"made": 0}

    def stop_requested() -> Any:
        calls["made"] += 1
        return "requested" if topology.rank == 1 and calls["made"] >= num_calls else None

    config: RunConfig = parse(RunConfig, raw)
    with pytest.raises(Preempted, match=f"Stopped at step {num_calls} as asked"):
        run_training(config, topology, stop_requested)
    return calls["made"]


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 3])
def test_all_ranks_stop_in_the_step_in_which_one_rank_was_asked_to(
    data: Path, tmp_path: Path, stage: int
) -> None:
    raw = pretraining(
        data,
        tmp_path,
        train=SPARSE_LOG,
        engine={"type": "zero", "zero_stage": stage},
        checkpoint={"every_steps": 100},
    )
    assert run_ranks(_stop_after_calls, 2, raw, 5, timeout_s=120) == [5, 5]
    (saved,) = (event for event in events(tmp_path) if event["kind"] == "save")
    assert saved["step"] == 5
    straight = pretraining(data, tmp_path / "straight", train=SPARSE_LOG)
    assert run(Topology(), {**raw, "engine": {"type": "local"}}).metrics["loss"] == pytest.approx(
        run(Topology(), straight).metrics["loss"], abs=2e-6
    )


def _interrupt_after(step: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a run gets SIGINT, as by Ctrl-C, `times` times, once `step` steps are complete."""
    run_step = Trainer._run_step

    def run_step_and_interrupt(trainer: Trainer, *arguments: Any) -> Any:
        signals = run_step(trainer, *arguments)
        if trainer.step == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)  # both are delivered
        return signals

    monkeypatch.setattr(Trainer, "_run_step", run_step_and_interrupt)


def test_ctrl_c_saves_as_sigterm_does(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = pretraining(data, tmp_path)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        _interrupt_after(5, 1, patch)
        with pytest.raises(Preempted, match="Stopped at step 6 as asked; start again to resume"):
            run(Topology(), raw)
    told = events(tmp_path)
    assert [event["step"] for event in told if event["kind"] == "save"] == [4, 6]
    assert (told[-1]["status"], told[-1]["step"]) == ("preempted", 6)
    assert "second Ctrl-C" in next(event for event in told if event["kind"] == "stop_requested")["next"]
    assert signal.getsignal(signal.SIGINT) is handler
    run(Topology(), raw)
    assert audit_run(str(tmp_path))[0].num_lost_steps == 0


def test_a_second_ctrl_c_ends_at_once_and_says_which_step_is_safe(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt_after(6, 2, monkeypatch)
    with pytest.raises(Interrupted) as caught:
        run(Topology(), pretraining(data, tmp_path, checkpoint={"every_steps": 4, "in_background": False}))
    assert caught.value.exit_code == 130
    assert str(caught.value) == (
        "Interrupted at step 6. Step 4 is saved: the same command goes on from there, and does 2 steps again."
    )
    last = events(tmp_path)[-1]
    assert (last["kind"], last["status"], last["step"]) == ("finish", "interrupted", 6)


def test_a_second_ctrl_c_before_the_first_commit_says_that_nothing_is_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupt_after(2, 2, monkeypatch)
    with pytest.raises(Interrupted, match=r"at step 2\. Nothing is saved yet: the same command starts anew"):
        run(Topology(), pretraining(data, tmp_path))


BLOCKED = """
import hashlib
from distft.run import stop_signals
stop_signals._UNWIND_S = 0.1
with stop_signals.stop_on_signals(lambda: None, on_request=lambda: print("asked", flush=True)):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # half an hour of native code
"""


def test_a_second_ctrl_c_ends_a_process_that_is_blocked_in_native_code() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == "asked\n"
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, stderr) == (130, "Interrupted while waiting for other ranks or a device.\n")


def test_a_process_that_ignores_interrupts_goes_on_to_ignore_them() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals(never_stop) as stop_requested:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop_requested() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_requested() == "requested"
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_save_that_failed_ends_the_run_at_the_next_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distft.checkpoint.store import CheckpointStore
    from distft.errors import StorageError

    def fail(*_: Any) -> str:
        raise StorageError("the disk is gone")

    monkeypatch.setattr(CheckpointStore, "save", fail)
    raw = pretraining(data, tmp_path, train={"max_steps": 400, "log_every_steps": 400})
    with pytest.raises(StorageError, match="the disk is gone"):
        run(Topology(), raw)
    assert logged(tmp_path) == {}  # long before the only step that is logged


def test_a_batch_without_targets_is_skipped_and_counted_as_such(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = PackedRows.batch

    def without_targets(rows: PackedRows, indices: Any) -> Any:
        batch = read(rows, indices)
        batch.targets[NEXT_TOKEN].fill_(IGNORE_INDEX)
        object.__setattr__(batch, "num_targets", {NEXT_TOKEN: 0})
        return batch

    monkeypatch.setattr(PackedRows, "batch", without_targets)
    train = {"max_steps": 4, "log_every_steps": 1, "max_skipped_in_a_row": 2}
    raw = pretraining(data, tmp_path, train=train, validation=None)
    run(Topology(), raw)
    assert logged(tmp_path, "steps_without_targets") == {1: 1, 2: 2, 3: 3, 4: 4}
    assert set(logged(tmp_path, "skipped_steps").values()) == {0}


def test_a_run_resumes_from_a_copy_of_its_data_elsewhere_but_not_from_other_data(
    data: Path, tmp_path: Path
) -> None:
    straight = pretraining(data, tmp_path / "straight")
    run(Topology(), straight)
    moved = Path(shutil.copytree(data / "shards", tmp_path / "moved"))
    elsewhere = {"type": "tokens", "sources": [{"path": str(moved / "train")}]}
    raw = pretraining(data, tmp_path / "run", train={"max_steps": 8, "log_every_steps": 1})
    run(Topology(), raw)
    longer = {**raw, "train": straight["train"], "data": elsewhere}
    run(Topology(), longer)
    assert [event["kind"] for event in events(tmp_path / "run")].count("resume") == 1
    other = {"type": "tokens", "sources": [{"path": str(moved / "validation")}]}
    with pytest.raises(ConfigError, match=r"data\.sources"):
        run(Topology(), {**longer, "train": {"max_steps": 20}, "data": other})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model": {"qk_norm": True}}, "model.qk_norm was False and is now True"),
        ({"lora": {"rslora": True}}, "lora.rslora was False and is now True"),
        ({"validation": {"split_seed": 7}}, "validation.split_seed was 0 and is now 7"),
        ({"seed": 1}, "seed was 0 and is now 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_the_saved_configuration_lacks_counts_as_its_default(
    data: Path, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    """In every section, also in the items of a list: what is left out of the file is left out of the dump."""
    raw = fine_tuning(
        data,
        tmp_path,
        tmp_path,
        model=pretraining(data, tmp_path)["model"],
        lora={"rank": 2},
        validation={"type": "split", "share": 0.2},
        phases=[{"steps": 2, "random_blocks": {"num_blocks": 1, "every_steps": 1}}, {"dropout": 0.1}],
    )
    config: RunConfig = parse(RunConfig, raw)
    written = config.model_dump(mode="json", exclude_unset=True)
    assert "rslora" not in written["lora"]
    assert "until_stalled" not in written["phases"][0]
    saved = Manifest.model_construct(config=written, data_fingerprint=None)
    require_resumable(saved, config, None)
    assert changed_settings(written, config) == []
    changed = {key: {**raw[key], **new} if isinstance(new, dict) else new for key, new in change.items()}
    with pytest.raises(ConfigError) as caught:
        require_resumable(saved, parse(RunConfig, {**raw, **changed}), None)
    assert str(caught.value).splitlines()[0] == f"{problem}."
