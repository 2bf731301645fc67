"""Reads text and label columns from JSONL and CSV files; errors name the line of every bad row."""

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
_MAX_SHOWN = 10  # different problems of a file, and lines of each; the others are counted


@dataclass(frozen=True, slots=True)
class Record:
    """The requested columns of one row of a file."""

    line: int  # from 1; of a CSV row that spans several lines, the last
    values: dict[str, str]  # by column


@dataclass(slots=True)
class RowErrors:
    """Collects the problems of a file's rows into one `DataError`."""

    path: str
    lines: dict[str, list[int]] = field(default_factory=dict)  # by problem
    num_errors: int = 0

    def add(self, line: int, problem: str) -> None:
        self.lines.setdefault(problem, []).append(line)
        self.num_errors += 1

    def raise_if_any(self) -> None:
        """Raise `DataError` with the first problems, each with its lines, and the number of others."""
        if self.lines:
            messages = [self._message(*item) for item in list(self.lines.items())[:_MAX_SHOWN]]
            if num_others := sum(len(lines) for lines in list(self.lines.values())[_MAX_SHOWN:]):
                messages.append(f"... and {num_others:,} more in {self.path}.")
            raise DataError("\n".join(messages))

    def _message(self, problem: str, lines: list[int]) -> str:
        shown = lines[1:_MAX_SHOWN]
        rest = f" and {len(lines) - _MAX_SHOWN:,} more" if len(lines) > _MAX_SHOWN else ""
        also = f" (Lines {', '.join(map(str, shown))}{rest} too.)" if shown else ""
        return f"{self.path}:{lines[0]}: {problem}{also}"


def read_records(
    path: str, *, texts: Sequence[str], labels: Sequence[str] = (), max_rows: int | None = None
) -> list[Record]:
    """Read the columns `texts` and `labels` of the first `max_rows` rows of a file.

    The name's suffix selects JSONL (one object per line), CSV or TSV (with a header), and the compression;
    `path` is any fsspec path. A text must be a string; a label may also be an integer or a boolean, and is
    returned in its JSON notation. Blank lines are not rows.

    Raises `DataError` with file and line: a file that is missing, empty, damaged or of another kind, bad
    JSON or CSV, a missing column, a value of the wrong type.
    """
    errors = RowErrors(path)
    records: list[Record] = []
    try:
        for line, row in _parse_rows(path):
            if max_rows is not None and len(records) + errors.num_errors >= max_rows:
                break
            if isinstance(row, str):
                errors.add(line, row)
                continue
            values = _select_columns(row, texts, labels)
            if isinstance(values, str):
                errors.add(line, values)
            else:
                records.append(Record(line, values))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.{_similar_files(path)}") from None
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path} cannot be read: {error or type(error).__name__}.") from error
    errors.raise_if_any()
    if not records:
        raise DataError(f"{path} has no rows.")
    return records


def _parse_rows(path: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line, row); in place of a bad row, a message about it."""
    suffixes = PurePosixPath(path).suffixes
    compression = _COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    kind = "".join((suffixes[:-1] if compression else suffixes)[-1:]).lower()
    if kind not in _JSON_SUFFIXES and kind not in _DELIMITERS:
        raise DataError(
            f"{path}: unknown file type: the name must end in .jsonl, .csv or .tsv, "
            f"or in one of these with .gz or .zst."
        )
    is_zstd = compression == "zstd"
    with fsspec.open(path, "rb", compression=None if is_zstd else compression) as file:
        lines = _zstd_lines(file) if is_zstd else file
        yield from _parse_json(lines) if kind in _JSON_SUFFIXES else _parse_csv(lines, _DELIMITERS[kind])


def _zstd_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file of zstd frames. zstandard's own reader does not detect a truncated file."""
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
            yield number, f"is not JSON: {reason}. Correct or remove the line."
        else:
            yield number, row if isinstance(row, dict) else "is JSON, but not an object with named columns."


def _parse_csv(lines: Iterable[bytes], delimiter: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    undecodable: list[tuple[int, str]] = []

    def decoded() -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                undecodable.append((number, _not_utf8(error)))
                yield line.decode("utf-8", errors="replace")

    limit = csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a long document
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
                yield reader.line_num, f"has {len(cells)} columns, but the header has {len(header)}."
    except csv.Error as error:
        yield reader.line_num, f"is not CSV: {error}."
    finally:
        csv.field_size_limit(limit)
    yield from undecodable


def _not_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}): convert the file to UTF-8."
    )


def _select_columns(row: dict[str, Any], texts: Sequence[str], labels: Sequence[str]) -> dict[str, str] | str:
    """The requested values of a row, or a message about the first bad one."""
    values = {}
    for column in (*texts, *labels):
        if column not in row:
            similar = difflib.get_close_matches(column, row, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, similar))}? " if similar else ""
            return f"has no column {column!r}; {hint}it has {', '.join(map(repr, row)) or 'none'}."
        value = row[column]
        if column in labels and isinstance(value, int):
            value = json.dumps(value)
        if not isinstance(value, str):
            expected = "a string or a whole number" if column in labels else "a string"
            return f"{column!r} is {json.dumps(value)[:60]}, but must be {expected}."
        if column in labels and not value.strip():
            return f"{column!r} is empty: every row needs a label."
        values[column] = value
    return values


def _similar_files(path: str) -> str:
    """A hint that names files with similar names in the same directory; empty if it cannot be listed."""
    try:
        filesystem, inner = fsspec.url_to_fs(path)
        parent = PurePosixPath(inner).parent
        siblings = [PurePosixPath(name).name for name in filesystem.ls(str(parent), detail=False)]
    except (OSError, ValueError):
        return ""
    similar = difflib.get_close_matches(PurePosixPath(path).name, siblings, n=3, cutoff=0.6)
    return f" The same directory has {' and '.join(similar)}." if similar else ""
