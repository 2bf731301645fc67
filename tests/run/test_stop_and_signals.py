"""Stop requests are heard at the next step, whatever the logging interval; empty batches; moved data."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.rank_pool import run_ranks
from support.small_runs import events, logged, pretraining, run

from distft.config import parse
from distft.data.packing import PackedRows
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import ConfigError, Preempted
from distft.run.config import RunConfig
from distft.run.train import run_training
from distft.topology import Topology

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


def test_a_setting_that_the_saved_configuration_lacks_counts_as_its_default(
    data: Path, tmp_path: Path
) -> None:
    from distft.checkpoint.committed import find_checkpoint
    from distft.run.resume import require_resumable

    raw = pretraining(data, tmp_path)
    run(Topology(), raw)
    manifest = find_checkpoint(str(tmp_path)).manifest
    saved = {
        **manifest.config,
        "model": {k: v for k, v in manifest.config["model"].items() if k != "qk_norm"},
    }
    config: RunConfig = parse(RunConfig, {**manifest.config, "run_dir": str(tmp_path)})
    require_resumable(manifest.model_copy(update={"config": saved}), config, None)
    assert config.model is not None
    changed = config.model_copy(update={"model": config.model.model_copy(update={"qk_norm": True})})
    with pytest.raises(ConfigError, match=r"model\.qk_norm was False and is now True"):
        require_resumable(manifest.model_copy(update={"config": saved}), changed, None)
