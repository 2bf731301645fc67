"""Reads labelled rows from JSONL and CSV files, and says of every bad row where it is."""

import csv
import difflib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import fsspec
import zstandard

from distft.errors import DataError

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MAX_FAULTS = 10  # kinds told of one file, and lines of one kind; the rest is counted


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a file."""

    line: int  # in the file, from 1; of a CSV row over several lines the last
    values: dict[str, str]  # the wanted columns


@dataclass(slots=True)
class Faults:
    """Gathers what is wrong with a file, so that one error can say all of it."""

    path: str
    rows: dict[str, list[int]] = field(default_factory=dict)  # lines in the file by what is wrong there
    num_rows: int = 0

    def add(self, line: int, what: str) -> None:
        self.rows.setdefault(what, []).append(line)
        self.num_rows += 1

    def raise_if_any(self) -> None:
        """Raise `DataError` with the first of the faults, each once, and the number of the others."""
        if self.rows:
            told = [self._told(what, lines) for what, lines in list(self.rows.items())[:_MAX_FAULTS]]
            if num_others := sum(len(lines) for lines in list(self.rows.values())[_MAX_FAULTS:]):
                told.append(f"... and {num_others:,} more in {self.path}.")
            raise DataError("\n".join(told))

    def _told(self, what: str, lines: list[int]) -> str:
        more = lines[1:_MAX_FAULTS]
        rest = f" and {len(lines) - _MAX_FAULTS:,} more" if len(lines) > _MAX_FAULTS else ""
        also = f" (Lines {', '.join(map(str, more))}{rest} too.)" if more else ""
        return f"{self.path}:{lines[0]}: {what}{also}"


def read_records(
    path: str, *, texts: Sequence[str], labels: Sequence[str] = (), max_rows: int | None = None
) -> list[Record]:
    """The columns `texts` and `labels` of the first `max_rows` rows of a file.

    JSONL (one object a line) or CSV and TSV (with a header), plain or compressed, by the name of the file;
    any fsspec path. A text is a string; a label may be a whole number or a truth value too, and is returned
    as the string that JSON has for it. Blank lines do not count as rows.

    Raises `DataError` with file and line: a file that is missing, empty, damaged or of another kind, bad
    JSON or CSV, a missing column, a value of the wrong type.
    """
    rows = _parse_rows(path)
    faults = Faults(path)
    records: list[Record] = []
    try:
        for line, row in rows:
            if max_rows is not None and len(records) + faults.num_rows >= max_rows:
                break
            if isinstance(row, str):
                faults.add(line, row)
                continue
            values = _wanted(row, texts, labels)
            if isinstance(values, str):
                faults.add(line, values)
            else:
                records.append(Record(line, values))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.{_near_files(path)}") from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path} cannot be read: {error or type(error).__name__}.") from error
    faults.raise_if_any()
    if not records:
        raise DataError(f"{path} holds no rows.")
    return records


def _parse_rows(path: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number with the row that stands there, or with what is wrong with it."""
    suffixes = PurePosixPath(path).suffixes
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = "".join((suffixes[:-1] if compression else suffixes)[-1:]).lower()
    if kind not in _JSON_SUFFIXES and kind not in _DELIMITERS:
        raise DataError(
            f"{path}: the name tells no kind of file that is read here; "
            f"it must end in .jsonl, .csv or .tsv, and may be compressed (.gz, .zst)."
        )
    is_zstd = compression == "zstd"
    with fsspec.open(path, "rb", compression=None if is_zstd else compression) as file:
        lines = _zstd_lines(file) if is_zstd else file
        yield from _parse_json(lines) if kind in _JSON_SUFFIXES else _parse_csv(lines, _DELIMITERS[kind])


def _zstd_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file of zstd frames. zstandard's own reader takes a truncated file for a complete one."""
    frame = None
    rest = b""
    while chunk := file.read(1 << 20):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
            yield from (line + b"\n" for line in lines)
            chunk = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends in the middle of a zstd frame")
    if rest:
        yield rest


def _parse_json(lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except UnicodeDecodeError as error:
            yield number, _not_utf8(error)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            yield number, f"is not JSON: {reason}. Mend or remove the line."
        else:
            yield number, row if isinstance(row, dict) else "is JSON, but no object with named columns."


def _parse_csv(lines: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    undecodable: list[tuple[int, str]] = []

    def decoded() -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                undecodable.append((number, _not_utf8(error)))
                yield line.decode("utf-8", errors="replace")

    limit = csv.field_size_limit(sys.maxsize)  # 128 KiB unless told, which is less than a long document
    try:
        reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
        header = next(reader, [])
        for cells in reader:
            if undecodable:
                yield undecodable.pop(0)
                undecodable.clear()
            elif len(cells) == len(header):
                yield reader.line_num, dict(zip(header, cells, strict=True))
            elif cells:
                yield reader.line_num, f"has {len(cells)} columns, and the header has {len(header)}."
    except csv.Error as error:
        yield reader.line_num, f"is not CSV: {error}."
    finally:
        csv.field_size_limit(limit)
    yield from undecodable


def _not_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}): convert the file to UTF-8."
    )


def _wanted(row: dict[str, Any], texts: Sequence[str], labels: Sequence[str]) -> dict[str, str] | str:
    """The wanted values of a row, or what is wrong with them."""
    values = {}
    for column in (*texts, *labels):
        if column not in row:
            near = difflib.get_close_matches(column, row, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            return f"has no column {column!r}; {hint}it has {', '.join(map(repr, row)) or 'none'}."
        value = row[column]
        if column in labels and isinstance(value, int):
            value = json.dumps(value)
        if not isinstance(value, str):
            wanted = "a string or a whole number" if column in labels else "a string"
            return f"{column!r} is {json.dumps(value)[:60]}, and must be {wanted}."
        if column in labels and not value.strip():
            return f"{column!r} is empty: every row needs a label."
        values[column] = value
    return values


def _near_files(path: str) -> str:
    """A hint at files of about the same name, where the directory can be listed."""
    try:
        filesystem, inner = fsspec.url_to_fs(path)
        parent = PurePosixPath(inner).parent
        siblings = [PurePosixPath(name).name for name in filesystem.ls(str(parent), detail=False)]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(PurePosixPath(path).name, siblings, n=3, cutoff=0.6)
    return f" Beside it there is {' and '.join(near)}." if near else ""
