"""Whatever file operation of a reshard is the last one, its source stays and it can be run again."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_scenarios import Scenario, run_alone
from faulty_disk import Died, FaultyDisk, Operation, drafts_in, error_of, names_in

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.reshard import write_distft
from distft.checkpoint.target import UNFINISHED
from distft.errors import CheckpointError

PARTLY = Scenario(micro_batch_size=8, trainable=("blocks.1.*", "norm.weight"))


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here, so nothing waits for the disk; that it would is a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # noqa: ARG005


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(run_alone(PARTLY, 2).save(str(tmp_path_factory.mktemp("source"))))


def _is_whole_or_nothing(target: Path, source: Checkpoint, said: str) -> bool:
    try:
        written = Checkpoint.open(str(target))
    except CheckpointError:
        return False
    assert written.faults() == [], said
    for name, record in source.manifest.parameters.items():
        for state in record.states:
            numel = torch.Size(record.shape).numel()
            assert torch.equal(written.read(name, state, 0, numel), source.read(name, state, 0, numel)), said
    return True


@pytest.mark.parametrize("before", ["nothing", "its manifest", "the end of its mark"])
@pytest.mark.parametrize("how", ["die", "torn", "full"])
def test_a_reshard_may_die_at_any_operation_and_be_run_again(
    source: Checkpoint, tmp_path: Path, how: Any, before: str
) -> None:
    """Also over what is left of one that died right before its manifest, or before its mark was removed."""
    target = tmp_path / "target"

    def write(fail_at: int | None = None, how: Any = "die") -> list[Operation]:
        with FaultyDisk(target, fail_at=fail_at, how=how) as disk:
            write_distft(source, str(target), world_size=2)
        return disk.operations

    first = write()
    names = names_in(target)
    died_at = {
        "its manifest": next(
            n for n, o in enumerate(first) if (o.kind, Path(o.path).name) == ("replace", MANIFEST)
        ),
        "the end of its mark": next(
            n for n, o in enumerate(first) if (o.kind, Path(o.path).name) == ("unlink", UNFINISHED)
        ),
    }

    def prepare() -> None:
        shutil.rmtree(target)
        if before != "nothing":
            assert isinstance(error_of(lambda: write(died_at[before])), Died)

    prepare()
    for number in range(len(write())):
        prepare()
        error = error_of(lambda number=number: write(number, how))  # type: ignore[misc]
        said = f"{how} at operation {number}: {error}"
        assert (how == "full" and error is None) or re.search("Died|no space left", repr(error)), said
        assert how != "full" or not drafts_in(target), said
        is_whole = _is_whole_or_nothing(target, source, said)
        if not is_whole or (target / UNFINISHED).exists():
            write()
        assert _is_whole_or_nothing(target, source, said), said
        assert names_in(target) == names, said


# The real thing
