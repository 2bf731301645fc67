"""Nothing in a manifest of token shards is trusted: each lie in it is one clear error."""

import copy
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.data.shard_layout import MANIFEST, ShardLayout
from distft.data.shard_manifest import ShardManifest
from distft.data.shard_writer import ShardWriter
from distft.data.shards import TokenShards
from distft.errors import DataError

LAYOUT = ShardLayout(vocab_size=100, tokenizer_fingerprint="abc", shard_tokens=7, eos_id=2)


def write(directory: Path, num_tokens: int = 30, layout: ShardLayout = LAYOUT) -> None:
    writer = ShardWriter(directory, layout, work="ab12")
    writer.append(np.arange(num_tokens) % 100, np.arange(0, num_tokens, 3), 3 * num_tokens)
    writer.commit({"identity": {}})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write(tmp_path / "shards")
    return tmp_path / "shards"


def change(directory: Path, path: str, value: Any) -> None:
    """Set the entry of the manifest at the dotted `path`; a value of `...` removes it."""
    manifest = json.loads((directory / MANIFEST).read_text())
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    entry = manifest
    for key in parents:
        entry = entry[key]
    if value is ...:
        del entry[last]
    else:
        entry[last] = value
    (directory / MANIFEST).write_text(json.dumps(manifest))


LIES = [
    ("dtype", "object"),
    ("dtype", "O"),
    ("dtype", "uint32"),
    ("dtype", "float64"),
    ("dtype", [["a", "O"]]),
    ("num_tokens", 10**9),
    ("num_tokens", 29),
    ("num_tokens", 0),
    ("num_tokens", -1),
    ("num_tokens", 2**70),
    ("num_tokens", 30.5),
    ("num_tokens", "30"),
    ("num_tokens", True),
    ("shard_tokens", 0),
    ("shard_tokens", 1),
    ("shard_tokens", 10**15),
    ("num_documents", 11),
    ("num_documents", 2**61),
    ("vocab_size", 0),
    ("vocab_size", 70_000),
    ("vocab_size", 20),
    ("max_token_id", 100),
    ("max_token_id", -1),
    ("eos_id", "x"),
    ("files", []),
    ("files", None),
    ("files.0.name", "/etc/passwd"),
    ("files.0.name", "../shards/shard_00000.bin"),
    ("files.0.name", "shard_00000.bin/../x"),
    ("files.0.name", "shard_00001-ab12.bin"),
    ("files.0.name", "shard_00000-ab12.bin\n"),
    ("files.0.name", "shard_00000-ab12.bin\0"),
    ("files.0.name", "s3://bucket/shard_00000.bin"),
    ("files.0.size_bytes", 13),
    ("files.0.size_bytes", -14),
    ("files.0.crc32", "zz"),
    ("files.0.more", 1),
    ("files.0", ...),
    ("files.5", ...),
    ("files.5.name", "shard_00005.bin"),
    ("format", "other"),
    ("format_version", 99),
    ("format_version", ...),
    ("extra", 1),
    ("unknown", 1),
]


@pytest.mark.parametrize(("path", "value"), LIES)
def test_a_lie_in_a_manifest_is_one_error_that_names_the_file(shards: Path, path: str, value: Any) -> None:
    change(shards, path, value)
    with pytest.raises(DataError) as caught:
        TokenShards.open(shards)
    assert str(shards / MANIFEST) in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_a_manifest_that_reads_memory_as_pointers_does_not_crash_the_interpreter(shards: Path) -> None:
    change(shards, "dtype", "object")
    code = (
        f"from distft.data.shards import TokenShards; print(TokenShards.open({str(shards)!r}).tokens(0, 5))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "DataError" in found.stderr


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
def test_any_json_gives_a_manifest_or_a_data_error(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("any")
    write(directory)
    manifest = json.loads((directory / MANIFEST).read_text())
    places = [(manifest, key) for key in manifest]
    places += [(file, key) for file in manifest["files"] for key in file]
    for _ in range(data.draw(st.integers(1, 3))):
        entry, key = data.draw(st.sampled_from(places))
        entry[key] = data.draw(json_values)
    try:
        parsed = ShardManifest.from_bytes(json.dumps(manifest).encode(), "m")
    except DataError:
        return
    assert parsed.shards[0].name.startswith("shard_00000")
    try:
        opened = TokenShards(directory, parsed)
    except DataError:
        return
    assert len(opened.tokens(0, opened.num_tokens)) == opened.num_tokens


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"1e999"])
def test_a_manifest_that_is_no_object_is_an_error(shards: Path, content: bytes) -> None:
    (shards / MANIFEST).write_bytes(content)
    with pytest.raises(DataError, match="is not a token shard manifest"):
        TokenShards.open(shards)


@pytest.mark.parametrize("name", [MANIFEST, "shard_00002-ab12.bin", "document_starts-ab12.bin"])
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a FIFO"),
        (os.mkdir, "a directory"),
        (lambda path: path.symlink_to("/dev/zero"), "device"),
    ],
)
def test_what_is_no_file_is_a_clear_error_at_once(shards: Path, name: str, make: Any, kind: str) -> None:
    (shards / name).unlink()
    make(shards / name)
    with pytest.raises(DataError, match=rf"{name} is .*{kind}"):
        TokenShards.open(shards)


def test_positions_of_documents_that_are_not_those_of_the_shards_are_an_error(shards: Path) -> None:
    for bad in (np.arange(1, 11), np.arange(0, 1000, 100), np.arange(0, -10, -1)):
        bad.astype("<i8").tofile(shards / "document_starts-ab12.bin")
        with pytest.raises(DataError, match="other positions than its manifest says"):
            _ = TokenShards.open(shards).document_starts


def test_a_manifest_is_parsed_again_before_it_is_written(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, LAYOUT)
    writer.append(np.arange(5), np.array([0]), 15)
    with pytest.raises(DataError, match="Invalid JSON"):
        writer.commit({"identity": "\ud800"})
    writer.abort()
    assert not (tmp_path / MANIFEST).exists()


def test_thousands_of_shards_are_read_with_few_open_files(tmp_path: Path) -> None:
    write(tmp_path, 1500, ShardLayout(vocab_size=100, tokenizer_fingerprint="abc", shard_tokens=1))
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 310, hard))
    try:
        opened = TokenShards.open(tmp_path)
        for _ in range(2):
            assert opened.tokens(0, 1500).tolist() == [i % 100 for i in range(1500)]
        few = TokenShards.open(tmp_path, max_maps=2)
        assert few.tokens(0, 1500).tolist() == [i % 100 for i in range(1500)]
        assert len(few._maps) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def test_the_fingerprint_depends_on_the_content_alone(tmp_path: Path) -> None:
    prints = set()
    for work in ("", "ab12", "cd34"):
        writer = ShardWriter(tmp_path / f"work{work}", LAYOUT, work=work)
        writer.append(np.arange(20), np.array([0]), 15)
        writer.commit()
        prints.add(TokenShards.open(tmp_path / f"work{work}").fingerprint)
    assert len(prints) == 1


def test_progress_is_not_changed_by_the_caller(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, LAYOUT)
    writer.append(np.arange(20), np.array([0]), 15)
    kept = copy.deepcopy(writer.flush())
    writer.append(np.arange(5), np.array([0]), 15)
    assert kept.num_tokens == 20
    writer.abort()
