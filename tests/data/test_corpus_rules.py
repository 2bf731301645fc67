"""One rule for what a row and a text are, in every format of a corpus, compressed or not."""

import csv
import gzip
import io
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from distft import storage
from distft.data import compressed, corpus_files
from distft.data.corpus import (
    CorpusConfig,
    CsvCorpus,
    JsonlCorpus,
    MixtureCorpus,
    ParquetCorpus,
    TextCorpus,
    WeightedCorpus,
    read_documents,
)
from distft.data.records import read_records
from distft.data.rows import parse_json_row
from distft.errors import DataError

COMPRESSORS: dict[str, Any] = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
BOM = "\ufeff"
words = st.text(st.sampled_from("ab \t\u00e9\U0001f600\u2028\x0c"), max_size=9)
texts_ = st.lists(words, min_size=1, max_size=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rules")


def write(path: Path, text: str | bytes) -> str:
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    path.write_bytes(COMPRESSORS[path.suffix if path.suffix in COMPRESSORS else ""](data))
    return str(path)


def texts(corpus: CorpusConfig, chunk_bytes: int = 1 << 20) -> list[str]:
    return [d.text for chunk in corpus.chunks(chunk_bytes) for d in chunk.documents()]


def skipped(corpus: CorpusConfig, chunk_bytes: int = 1 << 20) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for chunk in corpus.chunks(chunk_bytes):
        list(chunk.documents(counts))
    return dict(counts)


def csv_text(rows: list[str | None], ends: str = "\n") -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator=ends)
    writer.writerow(["id", "text"])
    writer.writerows([i, row] for i, row in enumerate(rows))
    return file.getvalue()


def same_rows(folder: Path, rows: list[str | None], suffix: str, ends: str, mark: str) -> list[CorpusConfig]:
    """The same rows as JSONL, CSV, TSV and Parquet."""
    objects = "".join(json.dumps({"id": i, "text": row}) + ends for i, row in enumerate(rows))
    table = csv_text(rows, ends)
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())}), path, row_group_size=3
    )
    return [
        JsonlCorpus(paths=(write(folder / f"rows.jsonl{suffix}", mark + objects),)),
        CsvCorpus(paths=(write(folder / f"rows.csv{suffix}", mark + table),)),
        ParquetCorpus(paths=(str(path),)),
    ]


@pytest.mark.parametrize("suffix", COMPRESSORS)
@given(
    rows=st.lists(st.none() | words | st.just('quoted "text",\r\nof\ntwo lines'), min_size=1, max_size=20),
    chunk_bytes=st.integers(1, 300),
    ends=st.sampled_from(["\n", "\r\n"]),
    mark=st.sampled_from(["", BOM]),
)
def test_rows_are_the_same_documents_in_every_format(
    folder: Path, suffix: str, rows: list[str | None], chunk_bytes: int, ends: str, mark: str
) -> None:
    expected = [row for row in rows if row is not None and row.strip()]
    num_null = rows.count(None)
    for corpus in same_rows(folder, rows, suffix, ends, mark):
        assert texts(corpus, chunk_bytes) == expected
        counts = skipped(corpus, chunk_bytes)
        assert sum(counts.values()) == len(rows) - len(expected)
        if not isinstance(corpus, CsvCorpus):  # CSV does not distinguish them
            assert counts.get("null", 0) == num_null


@pytest.mark.parametrize("unit", ["file", "line", "blank_line"])
@given(rows=texts_, gap=st.sampled_from(["\n", "\n\n", "\n \n\n"]), size=st.integers(1, 60))
def test_line_ends_marks_and_compression_change_no_document(
    folder: Path, unit: Any, rows: list[str], gap: str, size: int
) -> None:
    text = gap.join(["begin", *rows])
    found = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_files, "READ_BYTES", 7)
        for suffix in COMPRESSORS:
            for mark in ("", BOM):
                for ends in ("\n", "\r\n"):
                    path = write(folder / f"text.txt{suffix}", mark + text.replace("\n", ends))
                    corpus = TextCorpus(paths=(path,), documents=unit, max_document_bytes=size)
                    pieces = texts(corpus, size)
                    found.add("".join(pieces) if unit == "file" else tuple(pieces))
    assert len(found) == 1
    if unit == "file":
        assert found == {text}
    if unit == "line":
        assert found == {tuple(line for line in text.split("\n") if line.strip())}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_files_of_another_encoding_are_named_as_such(tmp_path: Path, encoding: str) -> None:
    mark = BOM if encoding.endswith("be") else ""
    for name, corpus in (("a.txt", TextCorpus), ("a.jsonl", JsonlCorpus), ("a.csv", CsvCorpus)):
        path = write(tmp_path / name, (mark + 'text\n{"text": "a"}\n').encode(encoding))
        with pytest.raises(DataError, match=rf"{name}:1: the file is UTF-16 or UTF-32: convert it"):
            texts(corpus(paths=(path,)))
        if name != "a.txt":
            with pytest.raises(DataError, match=rf"{name}:1: the file is UTF-16 or UTF-32: convert it"):
                read_records(path, texts=["text"])


HALF = json.dumps("half \ud83d")


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_half_a_character_is_an_error_with_file_and_line_in_every_format(tmp_path: Path, suffix: str) -> None:
    jsonl = write(
        tmp_path / f"a.jsonl{suffix}", f'{{"text": "a", "label": "x"}}\n{{"text": {HALF}, "label": "y"}}'
    )
    with pytest.raises(DataError, match=r":2: 'text' has a lone surrogate, '\\ud83d', at character 5"):
        texts(JsonlCorpus(paths=(jsonl,)))
    with pytest.raises(DataError, match=r":2: 'text' has a lone surrogate"):
        read_records(jsonl, texts=["text"], labels=["label"])
    label = write(tmp_path / f"b.jsonl{suffix}", f'{{"text": "a", "label": {HALF}}}')
    with pytest.raises(DataError, match=r":1: 'label' has a lone surrogate"):
        read_records(label, texts=["text"], labels=["label"])
    for corpus, name, text in (
        (CsvCorpus, f"a.csv{suffix}", "text\na\nhalf \ud83d\n"),
        (TextCorpus, f"a.txt{suffix}", "a\n\nhalf \ud83d\n"),
        (JsonlCorpus, f"c.jsonl{suffix}", '{"text": "a"}\n\n{"text": "\ud83d"}'),
    ):
        path = write(tmp_path / name, text)
        with pytest.raises(DataError, match=rf"{name}:3: .*not UTF-8"):
            texts(corpus(paths=(path,)))


def test_a_column_that_is_named_twice_is_refused_if_it_is_read(tmp_path: Path) -> None:
    jsonl = write(
        tmp_path / "a.jsonl", '{"text": "a", "id": 1, "id": {"x": 1, "x": 2}}\n{"text": 1, "text": "b"}'
    )
    table = write(tmp_path / "a.csv", "id,text,id,text\n1,a,2,b\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: has the key 'text' twice"):
        texts(JsonlCorpus(paths=(jsonl,)))
    with pytest.raises(DataError, match=r"a\.csv:1: the header names the column 'text' twice"):
        texts(CsvCorpus(paths=(table,)))
    for path in (jsonl, table):
        with pytest.raises(DataError, match="twice"):
            read_records(path, texts=["text"])
    column = pyarrow.array(["a"])
    pyarrow.parquet.write_table(
        pyarrow.table([column, column], names=["text", "text"]), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match=r"a\.parquet has the column 'text' twice"):
        texts(ParquetCorpus(paths=(str(tmp_path / "a.parquet"),)))


@pytest.mark.parametrize("column", ["text", "a_b", "\u4e2d", "a/b", 'a"b', "a\\b"])
def test_a_key_is_twice_however_it_is_escaped(column: str) -> None:
    plain = json.dumps(column, ensure_ascii=False)
    escaped = '"' + "".join(f"\\u{ord(character):04x}" for character in column) + '"'
    for one, other in ((plain, plain), (plain, escaped), (escaped, escaped), (json.dumps(column), plain)):
        line = f'{{"id": 1, {one}: "x", "id": 2, {other}: "y"}}'.encode()
        assert parse_json_row(line, ["id2"]) == {"id": 2, column: "y"}
        assert parse_json_row(line, ["id2", column]) == f"has the key {column!r} twice: keep one."


def test_a_column_that_one_file_lacks_names_the_file(tmp_path: Path) -> None:
    for name, column in (("a", "text"), ("b", "body")):
        write(tmp_path / f"{name}.jsonl", json.dumps({column: "x"}))
        write(tmp_path / f"{name}.csv", f"id,{column}\n1,x\n")
        pyarrow.parquet.write_table(pyarrow.table({column: ["x"]}), tmp_path / f"{name}.parquet")
    for corpus in (JsonlCorpus, CsvCorpus, ParquetCorpus):
        with pytest.raises(DataError, match=r"b\.\w+(:\d:)? has no column 'text'; it has .*'body'"):
            texts(corpus(paths=(str(tmp_path),)))


def test_a_csv_without_rows_still_names_its_missing_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text;label\n")
    with pytest.raises(DataError, match=r"a\.csv:1: has no column 'text'; did you mean 'text;label'"):
        texts(CsvCorpus(paths=(path,)))


STRINGS = [
    pyarrow.string(),
    pyarrow.large_string(),
    pyarrow.string_view(),
    pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
]


@pytest.mark.parametrize("kind", STRINGS, ids=str)
def test_every_arrow_type_of_text_is_read(tmp_path: Path, kind: Any) -> None:
    rows = ["a", None, "", "b", "a"]
    array = pyarrow.array(rows, pyarrow.string())
    array = array.dictionary_encode().cast(kind) if pyarrow.types.is_dictionary(kind) else array.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), tmp_path / "a.parquet")
    corpus = ParquetCorpus(paths=(str(tmp_path),))
    assert texts(corpus) == ["a", "b", "a"]
    assert skipped(corpus) == {"null": 1, "empty": 1}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([["a"], []], "list<.*not text. Nested columns are not read"),
        ([{"en": "a"}], "struct<.*not text. Nested columns are not read"),
        ([b"a"], "binary, not text"),
        ([None], "null, not text"),
    ],
)
def test_parquet_columns_of_other_types_are_refused(tmp_path: Path, values: list[Any], named: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: column 'text' is {named}"):
        texts(ParquetCorpus(paths=(str(tmp_path),)))


def test_a_parquet_text_that_is_not_utf8_names_file_and_rows(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"b\xe4d"])
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, rows 0 to 1: a text is not UTF-8"):
        texts(ParquetCorpus(paths=(str(tmp_path),)))


@pytest.mark.parametrize("change", ["grows", "shrinks", "touched", "replaced", "gone"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_file_that_changes_while_it_is_read_is_told(tmp_path: Path, name: str, change: str) -> None:
    path = tmp_path / name
    rows = [f'{{"text": "row {i}"}}\n' for i in range(200)]
    write(path, "".join(rows if "jsonl" in name else ["text\n", *(row.replace('"', "") for row in rows)]))
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 100}), path, row_group_size=10)
    kinds: dict[str, Any] = {
        "txt": TextCorpus,
        "jsonl": JsonlCorpus,
        "csv": CsvCorpus,
        "parquet": ParquetCorpus,
    }
    corpus = kinds[name.split(".")[1]](paths=(str(path),))
    chunks = corpus.chunks(100)
    first = next(iter(chunks))
    data = path.read_bytes()
    if change == "grows":
        path.write_bytes(data + data[-20:])
    elif change == "shrinks":
        path.write_bytes(data[:-20])
    elif change == "touched":
        os.utime(path, (time.time(), time.time() + 5))
    elif change == "replaced":
        (tmp_path / "new").write_bytes(data)
        os.utime(tmp_path / "new", (1, 1))
        (tmp_path / "new").replace(path)
    else:
        path.unlink()
    problem = rf"{name} (changed while it was read|does not exist any more)"
    with pytest.raises(DataError, match=problem):
        _ = [list(chunk.documents()) for chunk in (first, *chunks)]


@pytest.mark.parametrize("unit", ["line", "blank_line"])
@pytest.mark.parametrize("num_lines", [1, 3])
def test_a_line_longer_than_many_ranges_is_read_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: Any, num_lines: int
) -> None:
    gap = "\n" if unit == "line" else "\n\n"
    rows = ["short", *(f"{i}" * (400_000 // num_lines) for i in range(num_lines)), "last"]
    path = write(tmp_path / "a.txt", gap.join(rows))
    monkeypatch.setattr(corpus_files, "READ_BYTES", 64)
    num_read = 0
    read_range = storage.read_range

    def counted(url: str, start: int, stop: int) -> bytes:
        nonlocal num_read
        num_read += stop - start
        return read_range(url, start, stop)

    monkeypatch.setattr(storage, "read_range", counted)
    corpus = TextCorpus(paths=(path,), documents=unit)
    assert texts(corpus, 1000) == rows
    assert num_read < 3.2 * len(gap.join(rows))


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_a_document_over_the_limit_is_an_error_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(compressed, "MAX_ROW_BYTES", 200_000)
    long = "word, " * 100_000
    text = (write(tmp_path / f"a.txt{suffix}", f"a\n\n{long}"),)
    rows = (write(tmp_path / f"a.jsonl{suffix}", f'{{"text": "a"}}\n\n{{"text": "{long}"}}'),)
    table = (write(tmp_path / f"a.csv{suffix}", f"text\na\n{long}"),)
    corpora: list[CorpusConfig] = [
        TextCorpus(paths=text, documents="line"),
        TextCorpus(paths=text, documents="blank_line"),
        JsonlCorpus(paths=rows),
        CsvCorpus(paths=table),
    ]
    for corpus in corpora:
        with pytest.raises(DataError, match=r":3: a (line|paragraph) of more than 0 MiB: split it"):
            texts(corpus, 1000)
    file = TextCorpus(paths=(str(tmp_path / f"a.txt{suffix}"),), max_document_bytes=1000)
    assert "".join(texts(file)) == f"a\n\n{long}"


def test_a_quote_that_is_never_closed_ends_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distft.data.rows.MAX_ROW_BYTES", 1000)
    path = write(tmp_path / "a.csv", 'text\na\n"b' + "word\n" * 1000)
    with pytest.raises(DataError, match=r"a\.csv:\d+: is not CSV: field larger than field limit"):
        texts(CsvCorpus(paths=(path,)))
    assert csv.field_size_limit() > 1000


@given(count=st.integers(0, 30), chunk_bytes=st.integers(1, 400))
def test_parts_of_a_csv_make_up_the_file(folder: Path, count: int, chunk_bytes: int) -> None:
    rows: list[str | None] = [f"row {i}" * (i % 4) for i in range(count)]
    path = write(folder / "parts.csv", csv_text(rows))
    corpus = CsvCorpus(paths=(path,))
    parts = [part for chunk in corpus.chunks(chunk_bytes) for part in chunk.parts()]
    assert [d.text for part in parts for d in part.documents()] == [row for row in rows if row]
    assert sum(part.source_bytes for part in parts) == Path(path).stat().st_size


def test_a_mixture_counts_what_its_sources_skip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": null}\n{"text": " "}\n{"text": "a"}\n')
    source = JsonlCorpus(paths=(path,))
    mixture = MixtureCorpus(sources=(WeightedCorpus(corpus=source), WeightedCorpus(corpus=source)))
    assert skipped(mixture) == {"null": 2, "empty": 2}
    assert [d.text for d in read_documents(mixture)] == ["a", "a"]


def test_a_text_file_of_white_space_is_counted_as_empty(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", BOM + " \r\n")
    assert skipped(TextCorpus(paths=(path,))) == {"empty": 1}
    assert texts(TextCorpus(paths=(path,))) == []
