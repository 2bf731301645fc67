"""Token shards on disk: round trip, damage reports, resuming and committing."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.damage import flip_bit

from distft.data.shard_layout import MANIFEST, ShardLayout, token_dtype
from distft.data.shard_writer import ShardWriter
from distft.data.shards import TokenShards
from distft.errors import ConfigError, DataError


def layout(vocab_size: int = 1000, shard_tokens: int = 7) -> ShardLayout:
    return ShardLayout(
        vocab_size=vocab_size, tokenizer_fingerprint="abc", shard_tokens=shard_tokens, eos_id=2, pad_id=None
    )


def write(writer: ShardWriter, documents: list[list[int]]) -> None:
    for ids in documents:
        writer.append(np.array(ids, dtype=np.int64), np.zeros(1, dtype=np.int64), 3 * len(ids))


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Any:
    count = iter(range(1_000_000))
    folder = tmp_path_factory.mktemp("shards")
    return lambda: folder / str(next(count))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    writer = ShardWriter(tmp_path / "shards", layout())
    write(writer, [[i, i + 1, 2] for i in range(10)])
    writer.commit()
    return tmp_path / "shards"


documents = st.lists(st.lists(st.integers(0, 69_999), min_size=1, max_size=12), min_size=1, max_size=12)


@given(documents=documents, shard_tokens=st.integers(1, 20), cuts=st.data())
def test_any_range_of_tokens_and_documents_is_read_as_written(
    root: Any, documents: list[list[int]], shard_tokens: int, cuts: st.DataObject
) -> None:
    folder = root()
    writer = ShardWriter(folder, layout(70_000, shard_tokens))
    write(writer, documents)
    writer.commit({"note": 1})
    flat = [token for ids in documents for token in ids]
    owners = [number for number, ids in enumerate(documents) for _ in ids]
    opened = TokenShards.open(folder)
    opened.verify()
    start = cuts.draw(st.integers(0, len(flat)))
    stop = cuts.draw(st.integers(start, len(flat)))
    assert opened.tokens(start, stop).tolist() == flat[start:stop]
    assert opened.document_ids(start, stop).tolist() == owners[start:stop]
    assert opened.document_starts.tolist() == [owners.index(number) for number in range(len(documents))]
    assert (opened.num_tokens, opened.num_documents) == (len(flat), len(documents))
    assert (opened.num_bytes, opened.max_token_id) == (3 * len(flat), max(flat))
    assert (opened.eos_id, opened.bos_id, opened.extra) == (2, None, {"note": 1})


@given(documents=documents, shard_tokens=st.integers(1, 9), data=st.data())
def test_a_resumed_writer_gives_the_same_bytes(
    root: Any, documents: list[list[int]], shard_tokens: int, data: st.DataObject
) -> None:
    uninterrupted, resumed = root(), root()
    writer = ShardWriter(uninterrupted, layout(70_000, shard_tokens))
    write(writer, documents)
    writer.commit()
    flushed_at = data.draw(st.integers(0, len(documents)))
    died_at = data.draw(st.integers(flushed_at, len(documents)))
    writer = ShardWriter(resumed, layout(70_000, shard_tokens))
    write(writer, documents[:flushed_at])
    progress = copy.deepcopy(writer.flush())
    write(writer, documents[flushed_at:died_at])
    writer.abort()
    writer = ShardWriter(resumed, layout(70_000, shard_tokens), progress)
    write(writer, documents[flushed_at:])
    writer.commit()
    assert bytes_in(resumed) == bytes_in(uninterrupted)


def test_ids_are_uint16_if_the_vocabulary_fits_and_uint32_otherwise() -> None:
    assert token_dtype(1 << 16) == np.dtype("<u2")
    assert token_dtype((1 << 16) + 1) == np.dtype("<u4")


def test_no_shard_exceeds_shard_tokens(shards: Path) -> None:
    assert [p.stat().st_size for p in sorted(shards.glob("shard_*"))] == [14, 14, 14, 14, 4]


@pytest.mark.parametrize("bad", [-1, 1000])
def test_an_id_outside_the_vocabulary_is_an_error(tmp_path: Path, bad: int) -> None:
    writer = ShardWriter(tmp_path, layout())
    with pytest.raises(DataError, match=f"token id {bad} is outside the vocabulary of 1000"):
        write(writer, [[1, bad, 2]])
    writer.abort()


def test_shards_without_a_manifest_cannot_be_opened(shards: Path) -> None:
    (shards / MANIFEST).rename(shards / "manifest.json.tmp")
    with pytest.raises(DataError, match=r"never finished.*Run the same `distft tokenize` again"):
        TokenShards.open(shards)
    with pytest.raises(DataError, match="does not exist"):
        TokenShards.open(shards / "nowhere")


def test_opening_the_parent_directory_of_shards_names_them(shards: Path) -> None:
    with pytest.raises(DataError, match="name a subdirectory that has one: shards"):
        TokenShards.open(shards.parent)


def test_opening_names_all_missing_and_truncated_shards(shards: Path) -> None:
    (shards / "shard_00001.bin").unlink()
    (shards / "shard_00003.bin").write_bytes(b"short")
    with pytest.raises(DataError) as caught:
        TokenShards.open(shards)
    assert "shard_00001.bin is missing" in str(caught.value)
    assert "shard_00003.bin has 5 bytes, its manifest says 14" in str(caught.value)


@pytest.mark.parametrize("name", ["shard_00000.bin", "shard_00004.bin", "document_starts.bin"])
def test_verify_names_the_file_with_a_flipped_bit(shards: Path, name: str) -> None:
    flip_bit(shards / name)
    with pytest.raises(DataError, match=f"checksum differs from the manifest.*{name}"):
        TokenShards.open(shards).verify()


@pytest.mark.parametrize("manifest", ["{", "[]", '{"format": "distft-token-shards", "format_version": 99}'])
def test_an_unknown_manifest_is_an_error(shards: Path, manifest: str) -> None:
    (shards / MANIFEST).write_text(manifest)
    with pytest.raises(DataError, match=r"manifest\.json"):
        TokenShards.open(shards)


def test_committed_shards_are_not_overwritten(shards: Path) -> None:
    before = bytes_in(shards)
    with pytest.raises(DataError, match="already has committed token shards"):
        ShardWriter(shards, layout())
    assert bytes_in(shards) == before


def test_a_range_beyond_the_end_is_an_index_error(shards: Path) -> None:
    opened = TokenShards.open(shards)
    for start, stop in ((0, 31), (-1, 2), (5, 4)):
        with pytest.raises(IndexError, match="of 30"):
            opened.tokens(start, stop)


def test_files_that_do_not_match_the_progress_cannot_be_resumed(tmp_path: Path) -> None:
    for damage, problem in ((b"", "has 0 bytes where 8 were recorded"), (b"xxxxxxxx", "is damaged")):
        folder = tmp_path / str(len(damage))
        writer = ShardWriter(folder, layout())
        write(writer, [[1, 2, 3, 4]])
        progress = copy.deepcopy(writer.flush())
        writer.abort()
        (folder / "shard_00000.bin").write_bytes(damage)
        with pytest.raises(DataError, match=problem):
            ShardWriter(folder, layout(), progress)


def test_a_full_disk_is_an_error_and_work_resumes_from_the_last_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted, full = tmp_path / "uninterrupted", tmp_path / "full"
    rows = [[i, i + 1, 2] for i in range(10)]
    writer = ShardWriter(uninterrupted, layout(), work="ab12")
    write(writer, rows)
    writer.commit()
    writer = ShardWriter(full, layout(), work="ab12")
    write(writer, rows[:4])
    progress = copy.deepcopy(writer.flush())
    real_open = Path.open

    def open_on_full_disk(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        # Like a full disk, /dev/full accepts buffered writes and fails at the flush.
        return real_open(
            Path("/dev/full") if path.name == "shard_00002-ab12.bin" else path, mode, *rest, **named
        )

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        with pytest.raises(
            DataError, match=r"No space left on device.*free disk space and run the same command"
        ):
            write(writer, rows[4:])
    writer.abort()
    writer = ShardWriter(full, layout(), progress, work="ab12")
    write(writer, rows[4:])
    writer.commit()
    assert bytes_in(full) == bytes_in(uninterrupted)


def test_a_writer_without_tokens_cannot_commit(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, layout())
    with pytest.raises(DataError, match="no tokens were written"):
        writer.commit()
    writer.abort()
    assert not (tmp_path / MANIFEST).exists()


def test_the_files_do_not_depend_on_how_tokens_were_appended(shards: Path, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "again", layout())
    writer.append(np.array([t for i in range(10) for t in (i, i + 1, 2)]), np.arange(0, 30, 3), 90)
    writer.commit()
    assert bytes_in(tmp_path / "again") == bytes_in(shards)
    assert json.loads((shards / MANIFEST).read_text())["num_documents"] == 10


def test_a_shard_size_of_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="shard_tokens=0"):
        layout(shard_tokens=0)
