"""Hostile corpora and labelled data: each ends in documents or in one of our errors, within bounds."""

import gzip
import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from hostile.guard import Guard

READ = "hostile.corpus_readers:read_corpus"
READ_LABELLED = "hostile.corpus_readers:read_labelled"
MIB = 1 << 20
ROW = b'{"text": "a", "label": "b"}\n'


def zstd_blocks(num_blocks: int, *, window_log: int = 17, newlines: bool = False) -> bytes:
    """A zstandard frame of blocks that each repeat a space 128 KiB times: 4 bytes for 131,072."""
    header = struct.pack("<I", 0xFD2FB528) + b"\x00" + bytes([(window_log - 10) << 3])
    repeated = struct.pack("<I", (128 << 10 << 3) | 2)[:3] + b" "
    newline = struct.pack("<I", 1 << 3)[:3] + b"\n"
    last = struct.pack("<I", (1 << 3) | 1)[:3] + b"a"
    return header + (repeated + newline * newlines) * num_blocks + last


def gzip_of(byte: bytes, num_mib: int) -> bytes:
    """A gzip member of `num_mib` MiB of a byte."""
    compressor = zlib.compressobj(9, wbits=31)
    block = byte * MIB
    return b"".join(compressor.compress(block) for _ in range(num_mib)) + compressor.flush()


def parquet_of(path: Path, values: object, **options: object) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), path, **options)


def lines_of(*rows: bytes) -> bytes:
    return b"\n".join(rows)


# name, content, words of the error
REFUSED: list[tuple[str, Callable[[], bytes], tuple[str, ...]]] = [
    ("deep.jsonl", lambda: ROW + b"[" * 100_000, (":2:", "nested too deeply")),
    ("deep_objects.jsonl", lambda: b'{"a":' * 100_000, (":1:", "nested too deeply")),
    ("digits.jsonl", lambda: b'{"text": "a", "n": ' + b"9" * 100_000 + b"}", (":1:", "4,300 digits")),
    ("array.json", lambda: b'[{"text": "a"}, {"text": "b"}]', ("array of all rows", "jq -c")),
    ("pretty.json", lambda: b'[\n  {"text": "a"}\n]', ("a row must be one line", "jq -c")),
    ("half.jsonl", lambda: ROW + b'{"text": "\\udc00 end", "label": "b"}', (":2:", "lone surrogate")),
    ("bytes.jsonl", lambda: ROW + b'{"text": "\xed\xa0\xbd", "label": "b"}', (":2:", "not UTF-8")),
    ("nan.jsonl", lambda: b'{"text": NaN, "label": "b"}', (":1:", "must be a string")),
    ("infinity.jsonl", lambda: b'{"text": -Infinity, "label": 1}', (":1:", "must be a string")),
    ("twice.jsonl", lambda: b'{"text": "a", "text": "b", "label": "c"}', (":1:", "twice")),
    ("utf16.jsonl", lambda: ROW.decode().encode("utf-16"), (":1:", "UTF-16")),
    ("nul.jsonl", lambda: b"\0" * 100_000, (":1:", "is not JSON")),
    ("pointer.jsonl", lambda: b"version https://git-lfs.github.com/spec/v1\nsize 9\n", ("git-LFS pointer",)),
    (
        "pointer.jsonl.gz",
        lambda: b"version https://git-lfs.github.com/spec/v1\nsize 9\n",
        ("git-LFS pointer",),
    ),
    ("header.csv", lambda: b"text,label,text\na,b,c\n", (":1:", "twice")),
    ("quote.csv", lambda: b'text,label\n"never closed,a\n' + b"b,c\n" * 1000, ("is not CSV",)),
    ("quotes.csv", lambda: b'text,label\n"a"b,c\n', (":2:", "is not CSV")),
    ("columns.csv", lambda: b"text,label\n" + b"," * MIB, (":2:", "columns")),
    ("latin.csv", lambda: b"text,label\nd\xe9j\xe0,a\n", (":2:", "not UTF-8")),
    ("cut.gz.jsonl.gz", lambda: gzip.compress(ROW * 1000)[:-9], ("is damaged",)),
    ("crc.jsonl.gz", lambda: gzip.compress(ROW)[:-8] + b"\0" * 8, ("is damaged",)),
    ("cut.jsonl.zst", lambda: zstandard.compress(ROW * 1000)[:-3], ("is damaged",)),
    ("window.jsonl.zst", lambda: zstd_blocks(1, window_log=31), ("128 MiB of memory", "--long")),
    ("row.jsonl.zst", lambda: zstd_blocks(5000), (":1:", "line of more than 256 MiB")),
]


@pytest.mark.parametrize(("name", "content", "words"), REFUSED, ids=[name for name, _, _ in REFUSED])
def test_hostile_rows_are_refused_with_file_and_line(
    guard: Guard, tmp_path: Path, name: str, content: Callable[[], bytes], words: tuple[str, ...]
) -> None:
    path = tmp_path / name
    path.write_bytes(content())
    memory_mb = 1500 if name.startswith("row.") else 400  # a row of up to 256 MiB is held, and copied, whole
    for read in (READ, READ_LABELLED):
        outcome = guard.run(read, str(path), directories=[tmp_path], memory_mb=memory_mb)
        outcome.check_refused(str(path), *words)


BOMBS: list[tuple[str, Callable[[], bytes], str]] = [
    ("lines.jsonl.zst", lambda: zstd_blocks(3000, newlines=True)[:-1] + b"\n", "file"),
    ("lines.txt.zst", lambda: zstd_blocks(3000, newlines=True), "line"),
    ("spaces.csv.gz", lambda: gzip.compress(b"text\n") + gzip_of(b"\n", 2), "file"),
    ("members.jsonl.gz", lambda: gzip.compress(b"") * 50_000 + gzip.compress(ROW), "file"),
    ("frames.jsonl.zst", lambda: zstandard.compress(b"") * 50_000 + zstandard.compress(ROW), "file"),
    ("sections.txt.zst", lambda: zstd_blocks(2000), "file"),
    ("sections.txt", lambda: b"\x80" * MIB, "file"),
]


@pytest.mark.parametrize(("name", "content", "documents"), BOMBS, ids=[name for name, _, _ in BOMBS])
def test_what_becomes_gigabytes_is_read_in_constant_memory(
    guard: Guard, tmp_path: Path, name: str, content: Callable[[], bytes], documents: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content())
    outcome = guard.run(READ, str(path), documents, directories=[tmp_path])
    outcome.check()
    assert outcome.added_mb < 250


@pytest.mark.parametrize("kind", ["fifo", "socket", "zero", "directory", "self", "dangling"])
def test_what_is_no_file_is_refused_and_never_waited_for(guard: Guard, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            os.chdir(tmp_path)
            server.bind("a.jsonl")
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("a.jsonl" if kind == "self" else "nothing")
    for read in (READ, READ_LABELLED):
        guard.run(read, str(path), directories=[tmp_path], seconds=10).check_refused(str(path))
    if kind != "directory":
        outcome = guard.run(READ, str(tmp_path), directories=[tmp_path], seconds=10)
        outcome.check_refused(str(tmp_path))


def test_links_that_turn_in_circles_end(guard: Guard, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/up").symlink_to("../..")
    (tmp_path / "a/x.jsonl").write_bytes(ROW)
    outcome = guard.run(READ, str(tmp_path), directories=[tmp_path], seconds=10)
    outcome.check()
    assert outcome.returned["documents"] == 1


def test_a_small_parquet_file_with_large_texts_is_read_in_bounded_memory(
    guard: Guard, tmp_path: Path
) -> None:
    values = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 600, pyarrow.int32()), pyarrow.array(["word " * (MIB // 5)])
    )
    parquet_of(tmp_path / "a.parquet", values, compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < MIB
    outcome = guard.run(READ, str(tmp_path), directories=[tmp_path], memory_mb=700)
    outcome.check()
    assert outcome.returned["documents"] == 600  # 600 MiB of text


@pytest.mark.parametrize("position", range(0, 100, 7))
@pytest.mark.parametrize("value", [0, 0x7F, 0xFF])
def test_a_parquet_footer_with_any_other_byte_gives_rows_or_an_error(
    guard: Guard, tmp_path: Path, position: int, value: int
) -> None:
    parquet_of(tmp_path / "a.parquet", ["some text", None, "more"])
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[-1 - position * len(data) // 100] = value
    (tmp_path / "a.parquet").write_bytes(data)
    guard.run(READ, str(tmp_path), directories=[tmp_path], memory_mb=1500).check()


def test_names_in_messages_cannot_control_a_terminal(guard: Guard, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"\x1b[2J\x07" + "k" * 10_000: 1}))
    outcome = guard.run(READ, str(path), directories=[tmp_path])
    outcome.check_refused("has no column 'text'")
    assert "\x1b" not in outcome.message
    assert len(outcome.message) < 1000
