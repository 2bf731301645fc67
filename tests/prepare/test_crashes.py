"""A crash at any operation of the disk destroys neither old shards nor a user's file, and is resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.faulty_disk import Died, FaultyDisk, Operation

from distft.data.corpus import JsonlCorpus
from distft.data.shard_layout import MANIFEST
from distft.data.shards import TokenShards
from distft.errors import ConfigError
from distft.prepare import TokenizeConfig, pipeline, tokenize
from distft.prepare.work_log import LOG


@pytest.fixture(autouse=True)
def synced_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JsonlCorpus.chunks, "__defaults__", (5_000,))
    monkeypatch.setattr(pipeline, "_SYNC_INTERVAL_S", 0.0)


def settings(rows: Path, model: str, output: Path, **others: Any) -> TokenizeConfig:
    defaults = {"corpus": JsonlCorpus(paths=(str(rows),)), "num_workers": 1, "holdout": 0.3}
    return TokenizeConfig(tokenizer=model, output=str(output), **(defaults | others))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def rows(corpus: Path) -> Path:
    """A JSONL file of 24 documents."""
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[:24]))
    return corpus


def test_a_crash_at_any_operation_keeps_shards_and_foreign_files_and_is_resumed(
    rows: Path, model: str, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    tokenize(settings(rows, model, start, shard_tokens=4000))
    (start / "train" / "shard_00000.bin").write_text("of the user")
    new = {"shard_tokens": 2000}

    def overwrite(output: Path, fail_at: int | None) -> list[Operation]:
        shutil.copytree(start, output)
        with FaultyDisk(output, fail_at=fail_at) as disk:
            if fail_at is None:
                tokenize(settings(rows, model, output, **new), overwrite=True)
            else:
                with pytest.raises(Died):
                    tokenize(settings(rows, model, output, **new), overwrite=True)
        return disk.operations

    operations = overwrite(tmp_path / "whole", None)
    expected = content(tmp_path / "whole")
    assert len(operations) > 60
    for number in range(0, len(operations), 1 + len(operations) // 50):
        output = tmp_path / str(number)
        overwrite(output, number)
        assert (output / "train" / "shard_00000.bin").read_text() == "of the user", operations[number]
        for split in ("train", "validation"):
            TokenShards.open(output / split).verify()  # the old ones, or the new
        try:
            tokenize(settings(rows, model, output, **new))  # goes on
        except ConfigError:
            assert number < 8, operations[number]  # it had not begun: the old shards are all there is
            tokenize(settings(rows, model, output, **new), overwrite=True)
        assert content(output) == expected, operations[number]
        shutil.rmtree(output)


def test_data_and_their_directory_are_synced_before_the_name_that_makes_them_count(
    rows: Path, model: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with FaultyDisk(tmp_path) as disk:
        tokenize(settings(rows, model, output, shard_tokens=2000))
    operations = disk.operations

    def last(kind: str, path: Path, before: int | None = None) -> int:
        found = [i for i, o in enumerate(operations[:before]) if (o.kind, o.path) == (kind, str(path))]
        return found[-1] if found else -1

    for split in ("train", "validation"):
        manifest = output / split / MANIFEST
        committed = last("replace", manifest)
        for file in json.loads(manifest.read_text())["files"]:
            path = output / split / file["name"]
            written = last("write", path)
            assert 0 <= written < last("fsync", path) < committed, path
            assert last("open", path) < last("fsync", output / split, committed), path
        assert last("fsync", output / split) > committed
    assert last("fsync", output / LOG) < last("unlink", output / LOG)
    # What the log says was on the disk before.
    _, first_record, *_ = (
        i for i, o in enumerate(operations) if (o.kind, o.path) == ("fsync", str(output / LOG))
    )
    assert last("fsync", output / "train", first_record) > last("open", output / "train", first_record)
    assert last("unlink", output / LOG) > max(
        last("replace", output / s / MANIFEST) for s in ("train", "validation")
    )
