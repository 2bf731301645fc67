"""Files that earlier commits wrote stay readable: token shards and checkpoints of every format version."""

import os
import shutil
from pathlib import Path

import pytest
from support.commands import call_python
from support.small_runs import logged

from distft.checkpoint.committed import find_checkpoint
from distft.data.shards import TokenShards

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
LOSSES = {5: 2.932973861694336, 6: 2.908081531524658, 7: 2.8899636268615723, 8: 2.8884425163269043}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the files of format 1."""
    return Path(shutil.copytree(GOLDEN / "format_1", tmp_path / "format_1"))


def test_token_shards_of_format_1_are_intact(folder: Path) -> None:
    shards = TokenShards.open(folder / "shards" / "train")
    shards.verify()
    assert shards.num_tokens == 2625
    assert len(shards.document_starts) == 44


def test_every_byte_and_fingerprint_of_a_checkpoint_of_format_1_is_verified(folder: Path) -> None:
    checkpoint = find_checkpoint(str(folder / "run"))
    assert checkpoint.step == 4
    assert checkpoint.find_damage() == []
    assert checkpoint.find_tokenizer_damage() == []


@pytest.mark.parametrize("engine", ["type: local", "type: zero, zero_stage: 3"])
def test_a_run_of_format_1_resumes_with_the_losses_of_its_time(folder: Path, engine: str) -> None:
    done = call_python(
        "-m", "distft", "train", "run.yaml", f"engine={{{engine}}}", env=dict(os.environ), cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert logged(folder / "run") == {step: pytest.approx(loss, abs=2e-6) for step, loss in LOSSES.items()}
