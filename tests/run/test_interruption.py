"""Interrupted runs resume exactly, and damaged checkpoints are found before they are used."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.damage import flip_bit
from support.rank_pool import run_ranks
from support.small_runs import events, fine_tuning, logged, pretraining, run, run_until_power_cut

from distft.checkpoint.committed import find_checkpoint
from distft.errors import CheckpointError, DistftError
from distft.run.pretrained import open_checkpoint
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
    flip_bit(tmp_path / "broken" / "checkpoints" / "step_00000008" / "rank_00000.safetensors")
    run(Topology(), raw)
    assert logged(tmp_path / "broken") == logged(tmp_path / "straight")
    (damage,) = (event for event in events(tmp_path / "broken") if event["kind"] == "damaged_checkpoint")
    assert "rank_00000.safetensors is damaged" in damage["reason"]


def _run_until_disk_is_full(topology: Topology, raw: dict[str, Any], full_rank: int) -> str:
    """Run with a disk that is full on one rank at the second save; returns this rank's error message."""
    from distft.storage import local

    write = local.LocalWriter.write

    def refuse(writer: Any, data: Any, /) -> int:
        if topology.rank == full_rank and f"step_00000008/rank_{full_rank:05d}" in str(writer.path):
            with local.full_disk_as_storage_error(writer.path, len(data)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(writer, data)

    local.LocalWriter.write = refuse  # type: ignore[method-assign]
    try:
        run(topology, raw)
    except DistftError as error:
        return str(error)
    finally:
        local.LocalWriter.write = write  # type: ignore[method-assign]
    return "no error"


@pytest.mark.ranks
def test_a_full_disk_on_one_rank_ends_all_ranks_with_its_error_and_keeps_the_previous_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    raw = pretraining(data, tmp_path, engine={"type": "zero", "zero_stage": 2})
    messages = run_ranks(_run_until_disk_is_full, 2, raw, 1)
    assert all("rank_00001.safetensors: no space left" in message for message in messages), messages
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
    with pytest.raises(CheckpointError, match=r"is damaged, so the run cannot resume(.*\n)+step 8.*\nstep 4"):
        run(Topology(), raw)
    assert max(logged(tmp_path)) == 10


@pytest.fixture
def damaged_run(pretrained: Path, tmp_path: Path) -> Path:
    run_dir = tmp_path / "damaged"
    shutil.copytree(pretrained, run_dir)
    flip_bit(Path(find_checkpoint(str(run_dir)).path) / "rank_00000.safetensors")
    return run_dir


def test_a_run_does_not_start_from_a_damaged_checkpoint(
    data: Path, damaged_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors is damaged"):
        run(Topology(), fine_tuning(data, tmp_path / "tuned", damaged_run))
    assert not (tmp_path / "tuned").exists()


def test_a_damaged_checkpoint_is_not_opened_for_evaluation(damaged_run: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"rank_00000.safetensors is damaged(.*\n)+.*differs from what was saved"
    ):
        open_checkpoint(str(damaged_run))
