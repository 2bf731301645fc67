"""Crash safety of reshards: after a failure at any file operation, a rerun succeeds."""

import os
import re
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_scenarios import PARTLY, run_alone
from support.faulty_disk import Died, FaultyDisk, Operation, error_of, names_in, temporary_files_in

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.reshard import write_distft
from distft.checkpoint.target import UNFINISHED_MARKER
from distft.errors import CheckpointError


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: these tests cut no power. Whether fsync is called is tested in test_crash_safety."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # noqa: ARG005


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(run_alone(PARTLY, 2).save(str(tmp_path_factory.mktemp("source"))))


def _committed(target: Path) -> Checkpoint | None:
    try:
        return Checkpoint.open(str(target))
    except CheckpointError:
        return None


def _damage_and_differences(written: Checkpoint, source: Checkpoint) -> list[str]:
    """Damaged files of `written`, and the states that differ from those of `source`."""
    differing = []
    for name, record in source.manifest.parameters.items():
        numel = prod(record.shape)
        for state in record.states:
            if not torch.equal(written.read(name, state, 0, numel), source.read(name, state, 0, numel)):
                differing.append(f"{state} of {name}")
    return [*written.find_damage(), *differing]


@pytest.mark.parametrize(
    "previous_death", [None, ("replace", MANIFEST), ("unlink", UNFINISHED_MARKER)], ids=str
)
@pytest.mark.parametrize("how", ["die", "torn", "full"])
def test_a_reshard_that_fails_at_any_operation_can_be_rerun(
    source: Checkpoint, tmp_path: Path, how: Any, previous_death: tuple[str, str] | None
) -> None:
    """Also in the directory of a reshard that died right before it committed, or removed its marker."""
    target = tmp_path / "target"

    def write(fail_at: int | None = None, how: Any = "die") -> list[Operation]:
        with FaultyDisk(target, fail_at=fail_at, how=how) as disk:
            write_distft(source, str(target), world_size=2)
        return disk.operations

    operations = [(operation.kind, Path(operation.path).name) for operation in write()]
    names = names_in(target)

    def prepare() -> None:
        shutil.rmtree(target)
        if previous_death is not None:
            assert isinstance(error_of(lambda: write(operations.index(previous_death))), Died)

    prepare()
    for number in range(len(write())):
        prepare()
        error = error_of(lambda number=number: write(number, how))  # type: ignore[misc]
        accident = f"{how} at operation {number}: {error}"
        assert (how == "full" and error is None) or re.search("Died|no space left", repr(error)), accident
        assert how != "full" or not temporary_files_in(target), accident
        written = _committed(target)
        assert written is None or _damage_and_differences(written, source) == [], accident
        if written is None or (target / UNFINISHED_MARKER).exists():
            write()
        rewritten = _committed(target)
        assert rewritten is not None, accident
        assert _damage_and_differences(rewritten, source) == [], accident
        assert names_in(target) == names, accident
