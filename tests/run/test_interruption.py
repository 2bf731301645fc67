"""Interrupted runs resume exactly, and damaged checkpoints are found before they are used."""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.damage import flip_bit, rank_file
from support.rank_pool import run_ranks
from support.small_runs import events, fine_tuning, logged, pretraining, run, run_until_power_cut

from distft import storage
from distft.checkpoint.committed import find_checkpoint
from distft.checkpoint.writer_fence import WRITER_FILE
from distft.config import parse
from distft.errors import CheckpointError, ConfigError, DistftError
from distft.run.config import RunConfig
from distft.run.pretrained import open_model
from distft.run.resume import changed_settings
from distft.storage.local import LocalWriter
from distft.topology import Topology


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resume_repeats_the_losses_and_the_dropout(data: Path, tmp_path: Path, dropout: float) -> None:
    model = {**pretraining(data, tmp_path)["model"], "dropout": dropout}
    run(Topology(), pretraining(data, tmp_path / "straight", model=model))
    broken = pretraining(data, tmp_path / "broken", model=model)
    run_until_power_cut(broken, 6)
    run(Topology(), broken)
    assert logged(tmp_path / "broken") == logged(tmp_path / "straight")


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(data: Path, tmp_path: Path) -> None:
    run(Topology(), pretraining(data, tmp_path / "straight"))
    raw = pretraining(data, tmp_path / "broken")
    run_until_power_cut(raw, 10)
    damaged = rank_file(tmp_path / "broken" / "checkpoints" / "step_00000008")
    flip_bit(damaged)
    run(Topology(), raw)
    assert logged(tmp_path / "broken") == logged(tmp_path / "straight")
    (damage,) = (event for event in events(tmp_path / "broken") if event["kind"] == "damaged_checkpoint")
    assert f"{damaged.name} is damaged" in damage["reason"]


@contextmanager
def _full_disk(is_full: Callable[[Path], bool]) -> Iterator[None]:
    """Let the disk have no space for the files of which `is_full` is true."""
    write = LocalWriter.write

    def refuse(writer: Any, data: Any, /) -> int:
        if is_full(writer.path):
            with storage.full_disk_as_storage_error(writer.path, len(data)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(writer, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalWriter, "write", refuse)
        yield


def _run_until_disk_is_full(topology: Topology, raw: dict[str, Any], full_rank: int) -> str:
    """Run with a disk that is full on one rank at the second save; returns this rank's error message."""

    def is_full(path: Path) -> bool:
        return topology.rank == full_rank and f"step_00000008/rank_{full_rank:05d}" in str(path)

    with _full_disk(is_full):
        try:
            run(topology, raw)
        except DistftError as error:
            return str(error)
    return "no error"


@pytest.mark.ranks
def test_a_full_disk_on_one_rank_ends_all_ranks_with_its_error_and_keeps_the_previous_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    raw = pretraining(data, tmp_path, engine={"type": "zero", "zero_stage": 2})
    messages = run_ranks(_run_until_disk_is_full, 2, raw, 1)
    assert all(re.search(r"rank_00001_\w{8}.safetensors: no space left", message) for message in messages), (
        messages
    )
    assert find_checkpoint(str(tmp_path)).step == 4
    assert list((tmp_path / "checkpoints").rglob("*.draft-*")) == []  # temporary files
    run(Topology(), {**raw, "engine": {"type": "local"}})
    assert max(logged(tmp_path)) == 12


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_the_beginning(
    data: Path, tmp_path: Path
) -> None:
    raw = pretraining(data, tmp_path)
    run_until_power_cut(raw, 10)
    for file in (tmp_path / "checkpoints").rglob("*.safetensors"):
        flip_bit(file)
    with pytest.raises(
        CheckpointError, match=r"can be used, so the run cannot resume(.*\n)+step 8.*\nstep 4"
    ):
        run(Topology(), raw)
    assert max(logged(tmp_path)) == 10


@pytest.fixture
def damaged_run(pretrained: Path, tmp_path: Path) -> Path:
    run_dir = tmp_path / "damaged"
    shutil.copytree(pretrained, run_dir)
    flip_bit(rank_file(Path(find_checkpoint(str(run_dir)).path)))
    return run_dir


def test_a_run_does_not_start_from_a_damaged_checkpoint(
    data: Path, damaged_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"rank_00000_\w{8}.safetensors is damaged"):
        run(Topology(), fine_tuning(data, tmp_path / "tuned", damaged_run))
    assert not (tmp_path / "tuned").exists()


def test_a_damaged_checkpoint_is_not_opened_for_evaluation(damaged_run: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"rank_00000_\w{8}.safetensors is damaged(.*\n)+.*differs from what was saved"
    ):
        open_model(str(damaged_run))


def test_a_run_whose_checkpoints_are_gone_does_not_start_from_the_beginning(
    data: Path, tmp_path: Path
) -> None:
    """Such as a disk that is not mounted."""
    disk = tmp_path / "disk"
    checkpoint = {"every_steps": 4, "directory": str(disk / "checkpoints")}
    raw = pretraining(data, tmp_path / "run", checkpoint=checkpoint)
    run_until_power_cut(raw, 10)
    disk.rename(tmp_path / "away")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ConfigError, match=r"checkpoint of step 8 .*has none\. Is its disk mounted.*another run_dir"
    ):
        run(Topology(), raw)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
    assert not disk.exists()
    (tmp_path / "away").rename(disk)
    run(Topology(), raw)
    assert max(logged(tmp_path / "run")) == 12


def test_a_start_that_is_refused_leaves_the_claim_to_the_one_that_runs(data: Path, tmp_path: Path) -> None:
    raw = pretraining(data, tmp_path)
    run_until_power_cut(raw, 6)
    claim = (tmp_path / "checkpoints" / WRITER_FILE).read_bytes()
    with pytest.raises(ConfigError, match="seed was 0 and is now 5"):
        run(Topology(), {**raw, "seed": 5})
    run(Topology(), {**raw, "train": {"max_steps": 4}})  # nothing is left to do
    assert (tmp_path / "checkpoints" / WRITER_FILE).read_bytes() == claim


def _run_with_a_disk_that_is_full_for(topology: Topology, raw: dict[str, Any], name: str) -> int:
    """Run with a disk that has no space for the file `name`; returns this rank's exit code."""
    with _full_disk(lambda path: path.name == name):
        try:
            run(topology, raw)
        except DistftError as error:
            return error.exit_code if "no space left" in str(error) else 0
    return 0


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["config.yaml", WRITER_FILE])
def test_a_full_disk_at_the_start_is_a_fault_at_run_time_on_all_ranks(
    data: Path, tmp_path: Path, name: str
) -> None:
    raw = pretraining(data, tmp_path, engine={"type": "zero", "zero_stage": 2})
    assert run_ranks(_run_with_a_disk_that_is_full_for, 2, raw, name) == [1, 1]


def test_a_class_that_only_the_checkpoint_names_is_not_imported_by_a_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Class: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config: RunConfig = parse(RunConfig, pretraining(data, tmp_path / "run"))
    saved = config.model_dump(mode="json")
    saved["optim"]["schedule"] = {"type": "evil_module:Class"}
    saved["data"] = {"type": "evil_module:Class"}
    assert "optim.schedule" in changed_settings(saved, config)
    assert not (tmp_path / "was_run").exists()
