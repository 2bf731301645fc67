"""Readers of text: whatever the parts, the same documents come, once each and in order."""

import gzip
import json
import pickle
import sysconfig
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from distft.config import parse
from distft.data import corpus_files
from distft.data.corpus import (
    CorpusConfig,
    JsonlCorpus,
    MixtureCorpus,
    ParquetCorpus,
    StdlibCorpus,
    TextCorpus,
    WeightedCorpus,
    corpus_fingerprint,
    documents,
    source_bytes,
)
from distft.data.corpus_parts import CorpusPart
from distft.errors import DataError

WRITERS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
lines = st.lists(st.text(st.sampled_from("ab \t\u00e9\U0001f600"), max_size=12), max_size=30)


def write(path: Path, data: bytes) -> str:
    path.write_bytes(WRITERS[path.suffix if path.suffix in WRITERS else ""](data))
    return str(path)


def texts(parts: Any) -> list[str]:
    return [document.text for part in parts for document in part.documents()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.mark.parametrize("suffix", WRITERS)
@given(rows=lines, part_bytes=st.integers(1, 60), end=st.sampled_from(["", "\n", "\r\n", "\n\n"]))
def test_lines_come_once_each_and_in_order_whatever_the_parts(
    folder: Path, suffix: str, rows: list[str], part_bytes: int, end: str
) -> None:
    path = write(folder / f"lines.txt{suffix}", ("x\n" + "\r\n".join(rows) + end).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files, "READ_BYTES", 7)
        found = texts(TextCorpus(paths=(path,), documents="line").parts(part_bytes))
    assert found == ["x", *(row for row in rows if row.strip())]


@pytest.mark.parametrize("suffix", WRITERS)
@given(
    paragraphs=st.lists(
        st.text(st.sampled_from("ab\u00e9 "), min_size=1, max_size=9), min_size=1, max_size=20
    ),
    gap=st.sampled_from(["\n\n", "\n\n\n\n", "\r\n\r\n", "\n \t\n", "\n   \n\n \n"]),
    part_bytes=st.integers(1, 60),
)
def test_paragraphs_come_once_each_and_in_order_whatever_the_parts(
    folder: Path, suffix: str, paragraphs: list[str], gap: str, part_bytes: int
) -> None:
    blocks = [f"{text}.\n{text}!" for text in paragraphs]
    path = write(folder / f"paragraphs.txt{suffix}", ("\n" + gap.join(blocks) + "\n").encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files, "READ_BYTES", 5)
        found = texts(TextCorpus(paths=(path,), documents="blank_line").parts(part_bytes))
    assert [text.rstrip("\r") for text in found] == blocks


@pytest.mark.parametrize("suffix", WRITERS)
@given(
    words=st.lists(st.text(st.sampled_from("ab\u00e9\n \U0001f600"), max_size=9), max_size=30),
    joint=st.sampled_from([" ", "", "\n"]),
    piece_bytes=st.integers(1, 60),
)
def test_the_pieces_of_a_long_file_are_its_text_and_one_document(
    folder: Path, suffix: str, words: list[str], joint: str, piece_bytes: int
) -> None:
    text = joint.join(["begin", *words])
    path = write(folder / f"long.txt{suffix}", text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files, "READ_BYTES", 7)
        corpus = TextCorpus(paths=(path,), max_document_bytes=piece_bytes)
        pieces = [piece for part in corpus.parts(1) for piece in part.documents()]
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.continues for piece in pieces] == [False, *[True] * (len(pieces) - 1)]
    assert [piece.is_continued for piece in pieces] == [*[True] * (len(pieces) - 1), False]
    assert len({piece.draw("salt") for piece in pieces}) == 1


@pytest.mark.parametrize("suffix", WRITERS)
@given(rows=lines, part_bytes=st.integers(1, 200))
def test_jsonl_rows_come_once_each_and_in_order_whatever_the_parts(
    folder: Path, suffix: str, rows: list[str], part_bytes: int
) -> None:
    data = "".join(json.dumps({"id": i, "body": row}) + "\n\n" for i, row in enumerate(["x", *rows]))
    path = write(folder / f"rows.jsonl{suffix}", data.encode())
    corpus = JsonlCorpus(paths=(path,), text_column="body")
    assert texts(corpus.parts(part_bytes)) == ["x", *(row for row in rows if row)]
    assert sum(part.source_bytes for part in corpus.parts(part_bytes)) == source_bytes(corpus)


def test_a_document_knows_its_bytes(folder: Path) -> None:
    path = write(folder / "bytes.jsonl", '{"text": "é\\u20ac\\ud83d\\ude00a"}'.encode())
    assert [d.num_bytes for d in documents(JsonlCorpus(paths=(path,)))] == [10]


def test_parts_can_be_sent_to_another_process(folder: Path) -> None:
    paths = [write(folder / f"sent.txt{suffix}", b"one\ntwo\nthree") for suffix in WRITERS]
    corpora: list[CorpusConfig] = [
        TextCorpus(paths=tuple(paths), documents="line"),
        MixtureCorpus(sources=(WeightedCorpus(corpus=TextCorpus(paths=tuple(paths)), weight=0.5),)),
        StdlibCorpus(),
    ]
    for corpus in corpora:
        parts: list[CorpusPart] = list(corpus.parts())
        assert texts(pickle.loads(pickle.dumps(parts))) == texts(parts)


def test_small_files_are_read_together_and_large_ones_in_pieces(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i}")
    corpus = TextCorpus(paths=(str(tmp_path),))
    assert len(list(corpus.parts(100))) == 2
    assert texts(corpus.parts(100)) == [f"document {i}" for i in range(20)]
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n' * 1000)
    assert len(list(JsonlCorpus(paths=(str(tmp_path),)).parts(1000))) == 14


BAD_ROWS = [
    ('{"text": "a"', "not JSON"),
    ('{"text": 5}', "is wanted, here is int"),
    ('{"text": null}', "is wanted, here is NoneType"),
    ('["a"]', "is wanted, here is list"),
    ('{"body": "a", "id": 1}', "no column 'text'; there are: body, id"),
    ('{"text": "\\ud800"}', "lone surrogate"),
    (b'{"text": "\xff"}', "not UTF-8"),
]


@pytest.mark.parametrize("part_bytes", [1, 30, 1 << 20])
@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(("bad", "fault"), BAD_ROWS)
def test_a_bad_line_is_named_by_file_and_number(
    tmp_path: Path, bad: str | bytes, fault: str, suffix: str, part_bytes: int
) -> None:
    row = bad.encode() if isinstance(bad, str) else bad
    path = write(
        tmp_path / f"bad.jsonl{suffix}", b'{"text": "good"}\n' * 5 + b"\n" + row + b'\n{"text": "a"}\n'
    )
    with pytest.raises(DataError, match=fault) as caught:
        texts(JsonlCorpus(paths=(path,)).parts(part_bytes))
    assert str(caught.value).startswith(f"{path}:7: ")


def test_bytes_that_are_no_text_are_named_or_replaced_as_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "latin.txt", b"one\ntw\xf6\n")
    for unit in ("file", "line", "blank_line"):
        with pytest.raises(DataError, match=r"latin\.txt:2: byte 6 of the file is not UTF-8"):
            texts(TextCorpus(paths=(path,), documents=unit).parts())
    assert texts(TextCorpus(paths=(path,), documents="line", errors="replace").parts()) == ["one", "tw\ufffd"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_off_or_damaged_is_named(tmp_path: Path, suffix: str) -> None:
    data = json.dumps({"text": "".join(chr(33 + i * i % 90) for i in range(9000))}).encode()
    whole = Path(write(tmp_path / f"a.jsonl{suffix}", data)).read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-2], b"junk" + whole):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(broken)
        with pytest.raises(DataError, match=rf"a\.jsonl\{suffix} is damaged"):
            texts(JsonlCorpus(paths=(str(tmp_path / f"a.jsonl{suffix}"),)).parts())


@pytest.mark.parametrize(("suffix", "padding"), [(".gz", b""), (".gz", b"\0" * 9), (".zst", b"")])
def test_compressed_files_joined_end_to_end_are_read_to_the_end(
    tmp_path: Path, suffix: str, padding: bytes
) -> None:
    frames = [WRITERS[suffix](json.dumps({"text": text}).encode() + b"\n") for text in "abc"]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(padding.join(frames) + padding)
    assert texts(JsonlCorpus(paths=(str(tmp_path),)).parts()) == ["a", "b", "c"]


@pytest.mark.parametrize("string", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_rows_come_in_order_without_the_empty_ones(tmp_path: Path, string: Any) -> None:
    column = pyarrow.array([f"row {i}" for i in range(50)] + [None, "", "last"], string)
    table = pyarrow.table({"id": list(range(53)), "body": column})
    for name in ("a", "b"):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=10)
    corpus = ParquetCorpus(paths=(str(tmp_path),), text_column="body")
    expected = [*(f"row {i}" for i in range(50)), "last"]
    assert len(list(corpus.parts(1))) == 12
    assert texts(corpus.parts(1)) == texts(corpus.parts()) == expected * 2
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text'; it has id, body"):
        list(ParquetCorpus(paths=(str(tmp_path),)).parts())
    with pytest.raises(DataError, match="column 'id' is int64, not text"):
        list(ParquetCorpus(paths=(str(tmp_path),), text_column="id").parts())
    (tmp_path / "a.parquet").write_bytes(b"no such thing")
    with pytest.raises(DataError, match=r"a\.parquet is no Parquet file"):
        list(corpus.parts())


def test_directories_and_globs_are_sorted_and_a_file_comes_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt.gz", "deep/d.py", ".hidden.txt", ".git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, name.encode())
    (tmp_path / "empty.txt").touch()
    here = str(tmp_path)
    assert texts(TextCorpus(paths=(here,)).parts()) == ["a.md", "b.txt", "deep/c.txt.gz"]
    assert texts(TextCorpus(paths=(f"{here}/**/*.py", here)).parts())[:2] == ["deep/d.py", "a.md"]
    assert texts(TextCorpus(paths=(f"{here}/b.txt", here)).parts()) == ["b.txt", "a.md", "deep/c.txt.gz"]
    assert texts(TextCorpus(paths=(here,), suffixes=(".py",)).parts()) == ["deep/d.py"]


def test_every_path_that_finds_nothing_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    paths = [str(tmp_path / name) for name in ("missing.txt", "empty.txt", "folder", "*.md")]
    with pytest.raises(DataError) as caught:
        TextCorpus(paths=tuple(paths)).parts()
    assert [line for path in paths for line in str(caught.value).splitlines() if f" {path} " in line] == str(
        caught.value
    ).splitlines()
    assert "nothing to read" in str(caught.value).splitlines()[1]


def test_files_are_read_from_wherever_fsspec_reaches() -> None:
    with fsspec.open("memory://corpus/rows.jsonl", "wb") as file:
        file.write(b'{"text": "one"}\n{"text": "two"}\n')
    corpus = JsonlCorpus(paths=("memory://corpus",))
    assert texts(corpus.parts(1)) == ["one", "two"]
    assert texts(JsonlCorpus(paths=("memory://corpus/*.jsonl",)).parts()) == ["one", "two"]


def test_the_standard_library_is_there_sorted_and_without_its_tests() -> None:
    found = list(documents(StdlibCorpus()))
    root = sysconfig.get_paths()["stdlib"]
    names = [document.origin.removeprefix(root) for document in found]
    assert sum(document.num_bytes for document in found) > 3_000_000
    assert names == sorted(names)
    assert any(name.startswith("/argparse.py") for name in names)
    assert not any("/test/" in name or "/site-packages/" in name for name in names)


@pytest.mark.parametrize(("weight", "low", "high"), [(1, 1, 1), (2, 2, 2), (0.25, 0, 1), (2.25, 2, 3)])
def test_a_weight_is_how_often_documents_come(tmp_path: Path, weight: float, low: int, high: int) -> None:
    path = write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(2000)).encode())
    single = TextCorpus(paths=(path,), documents="line")
    found = texts(MixtureCorpus(sources=(WeightedCorpus(corpus=single, weight=weight),)).parts(500))
    counts = {text: len(list(group)) for text, group in groupby(sorted(found))}
    assert set(counts.values()) | {0} == set(range(low, high + 1)) | {0}
    assert len(found) == pytest.approx(2000 * weight, rel=0.1)
    assert found == texts(MixtureCorpus(sources=(WeightedCorpus(corpus=single, weight=weight),)).parts(9000))


def test_sources_come_one_after_the_other_and_their_faults_together(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{name}.txt", name.encode()) for name in "ab")
    raw = {
        "type": "mixture",
        "sources": [{"corpus": {"type": "text", "paths": p}, "weight": 2} for p in (b, a)],
    }
    mixture: MixtureCorpus = parse(CorpusConfig, raw)
    assert texts(mixture.parts()) == ["b", "b", "a", "a"]
    assert source_bytes(mixture) == 4
    Path(a).unlink()
    Path(b).unlink()
    with pytest.raises(DataError) as caught:
        mixture.files()
    assert a in str(caught.value)
    assert b in str(caught.value)


@given(share=st.floats(0.01, 0.99))
def test_two_spans_of_a_file_make_up_the_whole(folder: Path, share: float) -> None:
    text = "to be or not\nto be that is\n\nthe question " * 20
    path = write(folder / "span.txt", text.encode())
    halves = [TextCorpus(paths=(path,), span=span) for span in ((0.0, share), (share, 1.0))]
    found = [list(documents(half)) for half in halves]
    assert "".join(document.text for half in found for document in half) == text
    assert not any(d.continues or d.is_continued for half in found for d in half)
    assert len(found[0][0].text) == pytest.approx(share * len(text), abs=12)


@pytest.mark.parametrize("paths", ["a.txt", ["a.txt"], ["a.txt", "b.txt"]])
def test_paths_are_one_or_a_list_in_yaml_and_in_json(paths: Any) -> None:
    corpus: TextCorpus = parse(CorpusConfig, {"type": "text", "paths": paths})
    assert corpus.paths == (tuple(paths) if isinstance(paths, list) else (paths,))
    assert TextCorpus.model_validate_json(corpus.model_dump_json()) == corpus


def test_a_span_of_a_compressed_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", b"text")
    with pytest.raises(DataError, match="span needs uncompressed files"):
        TextCorpus(paths=(path,), span=(0.0, 0.9)).parts()


def test_a_fingerprint_changes_with_files_and_settings_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    corpora = [TextCorpus(paths=(path,)), TextCorpus(paths=(path,), documents="line")]
    first = [corpus_fingerprint(corpus) for corpus in corpora]
    assert len(set(first)) == 2
    assert first == [corpus_fingerprint(corpus) for corpus in corpora]
    write(tmp_path / "a.txt", b"other text")
    assert corpus_fingerprint(corpora[0]) != first[0]
