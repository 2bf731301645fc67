"""What ends a run on the way harms nothing that it has written."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from small_runs import events, fine_tuning, logged, pretraining, run, run_until_power_cut

from distft.checkpoint.committed import find_checkpoint
from distft.errors import CheckpointError, DistftError
from distft.run.pretrained import open_checkpoint
from distft.topology import Topology


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resume_repeats_every_draw(data: Path, tmp_path: Path, dropout: float) -> None:
    model = {**pretraining(data, tmp_path)["model"], "dropout": dropout}
    run(Topology(), pretraining(data, tmp_path / "straight", model=model))
    broken = pretraining(data, tmp_path / "broken", model=model)
    run_until_power_cut(broken, 6)
    run(Topology(), broken)
    assert logged(tmp_path / "broken") == logged(tmp_path / "straight")


def test_the_newest_checkpoint_is_damaged_and_the_one_before_serves(data: Path, tmp_path: Path) -> None:
    run(Topology(), pretraining(data, tmp_path / "straight"))
    raw = pretraining(data, tmp_path / "broken")
    run_until_power_cut(raw, 10)
    file = tmp_path / "broken" / "checkpoints" / "step_00000008" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)
    run(Topology(), raw)
    assert logged(tmp_path / "broken") == logged(tmp_path / "straight")
    (damage,) = (event for event in events(tmp_path / "broken") if event["kind"] == "damaged_checkpoint")
    assert "rank_00000.safetensors is damaged" in damage["reason"]


def _fill_the_disk(topology: Topology, raw: dict[str, Any], full_rank: int) -> str:
    """The second save finds no room on one rank; every rank hears of it."""
    from distft.storage import local

    write = local.LocalWriter.write

    def refuse(writer: Any, data: Any, /) -> int:
        if topology.rank == full_rank and f"step_00000008/rank_{full_rank:05d}" in str(writer.path):
            with local.full_disk_explained(writer.path, len(data)):
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
def test_a_full_disk_on_one_rank_ends_all_ranks_with_one_reason_and_keeps_the_commit_before(
    data: Path, tmp_path: Path
) -> None:
    raw = pretraining(data, tmp_path, engine={"type": "zero", "zero_stage": 2})
    said = run_ranks(_fill_the_disk, 2, raw, 1)
    assert all("rank_00001.safetensors: no space left" in message for message in said), said
    assert find_checkpoint(str(tmp_path)).step == 4
    drafts = list((tmp_path / "checkpoints").rglob("*.draft-*"))
    assert drafts == []
    run(Topology(), {**raw, "engine": {"type": "local"}})
    assert max(logged(tmp_path)) == 12


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)


def test_a_run_of_which_no_checkpoint_is_whole_is_not_started_afresh(data: Path, tmp_path: Path) -> None:
    raw = pretraining(data, tmp_path)
    run_until_power_cut(raw, 10)
    for file in (tmp_path / "checkpoints").rglob("*.safetensors"):
        _flip_a_bit(file)
    with pytest.raises(CheckpointError, match=r"is whole, so the run cannot go on(.*\n)+step 8.*\nstep 4"):
        run(Topology(), raw)
    assert max(logged(tmp_path)) == 10


def test_damage_is_told_by_whatever_reads_a_checkpoint(data: Path, pretrained: Path, tmp_path: Path) -> None:
    shutil.copytree(pretrained, tmp_path / "copy")
    _flip_a_bit(Path(find_checkpoint(str(tmp_path / "copy")).path) / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match=r"rank_00000.safetensors is damaged"):
        run(Topology(), fine_tuning(data, tmp_path / "tuned", tmp_path / "copy"))
    assert not (tmp_path / "tuned").exists()
    with pytest.raises(
        CheckpointError, match=r"rank_00000.safetensors is damaged(.*\n)+.*is not what was saved"
    ):
        open_checkpoint(str(tmp_path / "copy"))
