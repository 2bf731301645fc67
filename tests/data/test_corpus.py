"""Corpora: any chunk size gives the same documents, once each and in order."""

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
    ListedCorpus,
    MixtureCorpus,
    ParquetCorpus,
    StdlibCorpus,
    TextCorpus,
    WeightedCorpus,
    read_documents,
)
from distft.data.corpus_chunks import CorpusChunk
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


def texts(chunks: Any) -> list[str]:
    return [document.text for chunk in chunks for document in chunk.documents()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.mark.parametrize("suffix", WRITERS)
@given(rows=lines, chunk_bytes=st.integers(1, 60), end=st.sampled_from(["", "\n", "\r\n", "\n\n"]))
def test_lines_are_read_once_each_in_order_for_any_chunk_size(
    folder: Path, suffix: str, rows: list[str], chunk_bytes: int, end: str
) -> None:
    path = write(folder / f"lines.txt{suffix}", ("x\n" + "\r\n".join(rows) + end).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files, "READ_BYTES", 7)
        found = texts(TextCorpus(paths=(path,), documents="line").chunks(chunk_bytes))
    assert found == ["x", *(row for row in rows if row.strip())]


@pytest.mark.parametrize("suffix", WRITERS)
@given(
    paragraphs=st.lists(
        st.text(st.sampled_from("ab\u00e9 "), min_size=1, max_size=9), min_size=1, max_size=20
    ),
    gap=st.sampled_from(["\n\n", "\n\n\n\n", "\r\n\r\n", "\n \t\n", "\n   \n\n \n"]),
    chunk_bytes=st.integers(1, 60),
)
def test_paragraphs_are_read_once_each_in_order_for_any_chunk_size(
    folder: Path, suffix: str, paragraphs: list[str], gap: str, chunk_bytes: int
) -> None:
    blocks = [f"{text}.\n{text}!" for text in paragraphs]
    path = write(folder / f"paragraphs.txt{suffix}", ("\n" + gap.join(blocks) + "\n").encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files, "READ_BYTES", 5)
        found = texts(TextCorpus(paths=(path,), documents="blank_line").chunks(chunk_bytes))
    assert found == blocks


@pytest.mark.parametrize("suffix", WRITERS)
@given(
    words=st.lists(st.text(st.sampled_from("ab\u00e9\n \U0001f600"), max_size=9), max_size=30),
    joint=st.sampled_from([" ", "", "\n"]),
    section_bytes=st.integers(1, 60),
)
def test_the_sections_of_a_long_file_make_up_its_text_and_are_one_document(
    folder: Path, suffix: str, words: list[str], joint: str, section_bytes: int
) -> None:
    text = joint.join(["begin", *words])
    path = write(folder / f"long.txt{suffix}", text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files, "READ_BYTES", 7)
        corpus = TextCorpus(paths=(path,), max_document_bytes=section_bytes)
        sections = [section for chunk in corpus.chunks(1) for section in chunk.documents()]
    assert "".join(section.text for section in sections) == text
    assert [section.continues_previous for section in sections] == [False, *[True] * (len(sections) - 1)]
    assert [section.continues_in_next for section in sections] == [*[True] * (len(sections) - 1), False]
    assert len({section.sampling_hash("salt") for section in sections}) == 1


@pytest.mark.parametrize("suffix", WRITERS)
@given(rows=lines, chunk_bytes=st.integers(1, 200))
def test_jsonl_rows_are_read_once_each_in_order_for_any_chunk_size(
    folder: Path, suffix: str, rows: list[str], chunk_bytes: int
) -> None:
    data = "".join(json.dumps({"id": i, "body": row}) + "\n\n" for i, row in enumerate(["x", *rows]))
    path = write(folder / f"rows.jsonl{suffix}", data.encode())
    corpus = JsonlCorpus(paths=(path,), text_column="body")
    assert texts(corpus.chunks(chunk_bytes)) == ["x", *(row for row in rows if row.strip())]
    assert (
        sum(chunk.source_bytes for chunk in corpus.chunks(chunk_bytes)) == ListedCorpus(corpus).source_bytes
    )


def test_num_bytes_of_a_document_is_its_utf8_size(folder: Path) -> None:
    path = write(folder / "bytes.jsonl", '{"text": "é\\u20ac\\ud83d\\ude00a"}'.encode())
    assert [d.num_bytes for d in read_documents(JsonlCorpus(paths=(path,)))] == [10]


def test_chunks_can_be_pickled(folder: Path) -> None:
    paths = [write(folder / f"sent.txt{suffix}", b"one\ntwo\nthree") for suffix in WRITERS]
    corpora: list[CorpusConfig] = [
        TextCorpus(paths=tuple(paths), documents="line"),
        MixtureCorpus(sources=(WeightedCorpus(corpus=TextCorpus(paths=tuple(paths)), weight=0.5),)),
        StdlibCorpus(),
    ]
    for corpus in corpora:
        chunks: list[CorpusChunk] = list(corpus.chunks())
        assert texts(pickle.loads(pickle.dumps(chunks))) == texts(chunks)


def test_small_files_are_grouped_and_large_ones_split_into_chunks(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i}")
    corpus = TextCorpus(paths=(str(tmp_path),))
    assert len(list(corpus.chunks(100))) == 2
    assert texts(corpus.chunks(100)) == [f"document {i}" for i in range(20)]
    (tmp_path / "one.jsonl").write_text('{"text": "a"}\n' * 1000)
    assert len(list(JsonlCorpus(paths=(str(tmp_path),)).chunks(1000))) == 14


BAD_ROWS = [
    ('{"text": "a"', "not JSON"),
    ('{"text": 5}', "'text' is 5, but must be a string"),
    ('{"text": ["a"]}', "'text' is a JSON array, but must be a string"),
    ('{"text": "a", "id": 1, "text": "b"}', "has the key 'text' twice"),
    ('["a"]', "is a JSON array, not an object"),
    ('[{"text": "a"}]', "is a JSON array of all rows. Write one object per line"),
    ("[" * 100_000, "nested too deeply"),
    ('{"text": "a", "id": ' + "9" * 100_000 + "}", "has a number of more than 4,300 digits"),
    ('{"body": "a", "id": 1}', "no column 'text'; it has 'body', 'id'"),
    ('{"text": "\\ud800"}', "lone surrogate"),
    (b'{"text": "\xff"}', "not UTF-8"),
]


@pytest.mark.parametrize("chunk_bytes", [1, 30, 1 << 20])
@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(("bad", "problem"), BAD_ROWS)
def test_an_error_names_file_and_line_of_a_bad_row(
    tmp_path: Path, bad: str | bytes, problem: str, suffix: str, chunk_bytes: int
) -> None:
    row = bad.encode() if isinstance(bad, str) else bad
    path = write(
        tmp_path / f"bad.jsonl{suffix}", b'{"text": "good"}\n' * 5 + b"\n" + row + b'\n{"text": "a"}\n'
    )
    with pytest.raises(DataError, match=problem) as caught:
        texts(JsonlCorpus(paths=(path,)).chunks(chunk_bytes))
    assert str(caught.value).startswith(f"{path}:7: ")


def test_bytes_that_are_not_utf8_raise_or_are_replaced(tmp_path: Path) -> None:
    path = write(tmp_path / "latin.txt", b"one\ntw\xf6\n")
    for unit in ("file", "line", "blank_line"):
        with pytest.raises(DataError, match=r"latin\.txt:2: byte 6 of the file is not UTF-8"):
            texts(TextCorpus(paths=(path,), documents=unit).chunks())
    assert texts(TextCorpus(paths=(path,), documents="line", errors="replace").chunks()) == [
        "one",
        "tw\ufffd",
    ]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_or_damaged_compressed_file_raises(tmp_path: Path, suffix: str) -> None:
    data = json.dumps({"text": "".join(chr(33 + i * i % 90) for i in range(9000))}).encode()
    whole = Path(write(tmp_path / f"a.jsonl{suffix}", data)).read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-2], b"junk" + whole):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(broken)
        with pytest.raises(DataError, match=rf"a\.jsonl\{suffix} is damaged"):
            texts(JsonlCorpus(paths=(str(tmp_path / f"a.jsonl{suffix}"),)).chunks())


@pytest.mark.parametrize(("suffix", "padding"), [(".gz", b""), (".gz", b"\0" * 9), (".zst", b"")])
def test_concatenated_compressed_files_are_read_to_the_end(
    tmp_path: Path, suffix: str, padding: bytes
) -> None:
    frames = [WRITERS[suffix](json.dumps({"text": text}).encode() + b"\n") for text in "abc"]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(padding.join(frames) + padding)
    assert texts(JsonlCorpus(paths=(str(tmp_path),)).chunks()) == ["a", "b", "c"]


@pytest.mark.parametrize("string", [pyarrow.string(), pyarrow.large_string()])
def test_parquet_rows_are_read_in_order_without_empty_ones(tmp_path: Path, string: Any) -> None:
    column = pyarrow.array([f"row {i}" for i in range(50)] + [None, "", "last"], string)
    table = pyarrow.table({"id": list(range(53)), "body": column})
    for name in ("a", "b"):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=10)
    corpus = ParquetCorpus(paths=(str(tmp_path),), text_column="body")
    expected = [*(f"row {i}" for i in range(50)), "last"]
    assert len(list(corpus.chunks(1))) == 12
    assert texts(corpus.chunks(1)) == texts(corpus.chunks()) == expected * 2
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text'; it has 'id', 'body'"):
        list(ParquetCorpus(paths=(str(tmp_path),)).chunks())
    with pytest.raises(DataError, match="column 'id' is int64, not text"):
        list(ParquetCorpus(paths=(str(tmp_path),), text_column="id").chunks())
    (tmp_path / "a.parquet").write_bytes(b"no such thing")
    with pytest.raises(DataError, match=r"a\.parquet is damaged, or no Parquet file"):
        list(corpus.chunks())


def test_directories_and_globs_are_sorted_and_a_file_is_read_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt.gz", "deep/d.py", ".hidden.txt", ".git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, name.encode())
    (tmp_path / "empty.txt").touch()
    here = str(tmp_path)
    assert texts(TextCorpus(paths=(here,)).chunks()) == ["a.md", "b.txt", "deep/c.txt.gz"]
    assert texts(TextCorpus(paths=(f"{here}/**/*.py", here)).chunks())[:2] == ["deep/d.py", "a.md"]
    assert texts(TextCorpus(paths=(f"{here}/b.txt", here)).chunks()) == ["b.txt", "a.md", "deep/c.txt.gz"]
    assert texts(TextCorpus(paths=(here,), suffixes=(".py",)).chunks()) == ["deep/d.py"]


def test_one_error_names_every_path_that_matches_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    paths = [str(tmp_path / name) for name in ("missing.txt", "empty.txt", "folder", "*.md")]
    with pytest.raises(DataError) as caught:
        TextCorpus(paths=tuple(paths)).chunks()
    assert [line for path in paths for line in str(caught.value).splitlines() if f" {path} " in line] == str(
        caught.value
    ).splitlines()
    assert "nothing to read" in str(caught.value).splitlines()[1]


def test_corpora_read_fsspec_urls() -> None:
    with fsspec.open("memory://corpus/rows.jsonl", "wb") as file:
        file.write(b'{"text": "one"}\n{"text": "two"}\n')
    corpus = JsonlCorpus(paths=("memory://corpus",))
    assert texts(corpus.chunks(1)) == ["one", "two"]
    assert texts(JsonlCorpus(paths=("memory://corpus/*.jsonl",)).chunks()) == ["one", "two"]


def test_the_stdlib_corpus_is_sorted_and_excludes_tests() -> None:
    found = list(read_documents(StdlibCorpus()))
    root = sysconfig.get_paths()["stdlib"]
    names = [document.origin.removeprefix(root) for document in found]
    assert sum(document.num_bytes for document in found) > 3_000_000
    assert names == sorted(names)
    assert any(name.startswith("/argparse.py") for name in names)
    assert not any("/test/" in name or "/site-packages/" in name for name in names)


@pytest.mark.parametrize(("weight", "low", "high"), [(1, 1, 1), (2, 2, 2), (0.25, 0, 1), (2.25, 2, 3)])
def test_a_weight_is_how_often_documents_are_used(tmp_path: Path, weight: float, low: int, high: int) -> None:
    path = write(tmp_path / "a.txt", "".join(f"line {i}\n" for i in range(2000)).encode())
    single = TextCorpus(paths=(path,), documents="line")
    found = texts(MixtureCorpus(sources=(WeightedCorpus(corpus=single, weight=weight),)).chunks(500))
    counts = {text: len(list(group)) for text, group in groupby(sorted(found))}
    assert set(counts.values()) | {0} == set(range(low, high + 1)) | {0}
    assert len(found) == pytest.approx(2000 * weight, rel=0.1)
    assert found == texts(MixtureCorpus(sources=(WeightedCorpus(corpus=single, weight=weight),)).chunks(9000))


def test_sources_are_read_in_sequence_and_their_errors_reported_together(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{name}.txt", name.encode()) for name in "ab")
    raw = {
        "type": "mixture",
        "sources": [{"corpus": {"type": "text", "paths": p}, "weight": 2} for p in (b, a)],
    }
    mixture: MixtureCorpus = parse(CorpusConfig, raw)
    assert texts(mixture.chunks()) == ["b", "b", "a", "a"]
    assert ListedCorpus(mixture).source_bytes == 4
    Path(a).unlink()
    Path(b).unlink()
    with pytest.raises(DataError) as caught:
        mixture.files()
    assert a in str(caught.value)
    assert b in str(caught.value)


@given(share=st.floats(0.01, 0.99))
def test_two_adjacent_spans_make_up_the_whole_file(folder: Path, share: float) -> None:
    text = "to be or not\nto be that is\n\nthe question " * 20
    path = write(folder / "span.txt", text.encode())
    halves = [TextCorpus(paths=(path,), span=span) for span in ((0.0, share), (share, 1.0))]
    found = [list(read_documents(half)) for half in halves]
    assert "".join(document.text for half in found for document in half) == text
    assert not any(d.continues_previous or d.continues_in_next for half in found for d in half)
    assert len(found[0][0].text) == pytest.approx(share * len(text), abs=12)


@pytest.mark.parametrize("paths", ["a.txt", ["a.txt"], ["a.txt", "b.txt"]])
def test_paths_may_be_a_string_or_a_list(paths: Any) -> None:
    corpus: TextCorpus = parse(CorpusConfig, {"type": "text", "paths": paths})
    assert corpus.paths == (tuple(paths) if isinstance(paths, list) else (paths,))
    assert TextCorpus.model_validate_json(corpus.model_dump_json()) == corpus


def test_a_span_of_a_compressed_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", b"text")
    with pytest.raises(DataError, match="span needs uncompressed files"):
        TextCorpus(paths=(path,), span=(0.0, 0.9)).chunks()


def test_a_fingerprint_depends_on_files_and_settings_only(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    corpora = [TextCorpus(paths=(path,)), TextCorpus(paths=(path,), documents="line")]
    first = [ListedCorpus(corpus).fingerprint for corpus in corpora]
    assert len(set(first)) == 2
    assert first == [ListedCorpus(corpus).fingerprint for corpus in corpora]
    write(tmp_path / "a.txt", b"other text")
    assert ListedCorpus(corpora[0]).fingerprint != first[0]
