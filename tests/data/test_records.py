import csv
import gzip
import io
import json
from pathlib import Path

import fsspec
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distft.data.records import read_records
from distft.errors import DataError

ROWS = [{"text": "one\ntwo, three", "label": "a"}, {"text": 'he said "no" é', "label": "b"}]
COMPRESSORS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


def encoded(rows: list[dict[str, str]], kind: str) -> bytes:
    if kind == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def error_of(path: Path, content: bytes, **settings_: object) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read_records(str(path), **{"texts": ["text"], "labels": ["label"], **settings_})
    return str(raised.value)


@pytest.mark.parametrize("suffix", COMPRESSORS)
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv"])
def test_every_format_and_compression_gives_the_same_rows(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"rows.v2{kind}{suffix}"
    path.write_bytes(COMPRESSORS[suffix](encoded(ROWS * 50, kind)))
    records = read_records(str(path), texts=["text"], labels=["label"])
    assert [record.values for record in records] == ROWS * 50


@given(rows=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=20))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_unicode_text_is_read_from_jsonl_in_several_zstd_frames(tmp_path: Path, rows: list[str]) -> None:
    path = tmp_path / "rows.jsonl.zst"
    lines = [json.dumps({"text": row}, ensure_ascii=False).encode() + b"\n" for row in rows]
    half = len(lines) // 2
    path.write_bytes(b"".join(zstandard.compress(b"".join(frame)) for frame in (lines[:half], lines[half:])))
    assert [record.values["text"] for record in read_records(str(path), texts=["text"])] == rows


def test_read_records_reads_fsspec_urls() -> None:
    with fsspec.open("memory://rows/train.jsonl", "wb") as file:
        file.write(encoded(ROWS, ".jsonl"))
    assert len(read_records("memory://rows/train.jsonl", texts=["text"])) == 2


def test_labels_may_be_integers_and_booleans(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 3}\n\n{"text": "b", "label": true}\n')
    records = read_records(str(path), texts=["text"], labels=["label"])
    assert [(record.line, record.values["label"]) for record in records] == [(1, "3"), (3, "true")]


def test_rows_after_max_rows_are_not_parsed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encoded(ROWS, ".jsonl") + b"broken\n")
    assert len(read_records(str(path), texts=["text"], max_rows=2)) == 2


def test_a_csv_field_may_exceed_the_default_limit_of_the_csv_module(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(encoded([{"text": "x" * 200_000}], ".csv"))
    limit = csv.field_size_limit()
    assert len(read_records(str(path), texts=["text"])[0].values["text"]) == 200_000
    assert csv.field_size_limit() == limit


def test_one_error_names_every_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        b'{"text": "fine", "label": "a"}',
        b'{"text": "cut off',
        b"[1, 2]",
        b'{"txt": "b", "label": "a"}',
        b'{"text": 5, "label": "a"}',
        b'{"text": "c", "label": null}',
        b'{"text": "d", "label": " "}',
        b'{"text": "\xff", "label": "a"}',
    ]
    message = error_of(path, b"\n".join(lines))
    for line, problem in [
        (2, "is not JSON"),
        (3, "not an object"),
        (4, "has no column 'text'; did you mean 'txt'? it has 'txt', 'label'"),
        (5, "'text' is 5, but must be a string"),
        (6, "'label' is null"),
        (7, "'label' is empty"),
        (8, "not UTF-8"),
    ]:
        assert f"{path}:{line}: " in message
        assert problem in message.splitlines()[line - 2]
    assert len(message.splitlines()) == 7


def test_the_error_lists_at_most_ten_problems_and_ten_lines_of_each(tmp_path: Path) -> None:
    same = error_of(tmp_path / "rows.jsonl", b'{"body": "a", "label": "b"}\n' * 1000)
    assert len(same.splitlines()) == 1
    assert "rows.jsonl:1: has no column 'text'" in same
    assert "(Lines 2, 3, 4, 5, 6, 7, 8, 9, 10 and 990 more too.)" in same
    different = error_of(
        tmp_path / "rows.jsonl", b"".join(b'{"text": %d, "label": "b"}\n' % i for i in range(1000))
    )
    assert len(different.splitlines()) == 11
    assert "... and 990 more in" in different


def test_an_error_names_the_lines_of_bad_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    assert f"{path}:3: has 3 columns, but the header has 2" in error_of(path, b"text,label\na,b\na,b,c\n")
    assert f"{path}:2: is not CSV" in error_of(path, b'text,label\n"a"b,c\n')
    assert f"{path}:2: is not UTF-8" in error_of(path, b"text,label\na\xff,c\n")
    assert "has no column 'label'" in error_of(path, b"text\na\n")


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", b"\n \n"), ("rows.csv", b""), ("rows.csv", b"text,label\n"), ("rows.jsonl", b"")],
)
def test_a_file_without_rows_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    assert "has no rows" in error_of(tmp_path / name, content)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_or_invalid_compressed_file_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    whole = COMPRESSORS[suffix](encoded(ROWS * 100, ".jsonl"))
    assert f"{path} is damaged" in error_of(path, whole[:-5])
    assert f"{path} is damaged" in error_of(path, b"not compressed at all")


def test_the_error_for_a_missing_file_suggests_similar_names(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist.*train\.jsonl"):
        read_records(str(tmp_path / "trian.jsonl"), texts=["text"])


def test_the_error_for_an_unknown_file_type_lists_the_known_ones(tmp_path: Path) -> None:
    assert ".jsonl, .csv, .tsv or .parquet" in error_of(tmp_path / "rows.parquet.gz", b"")
