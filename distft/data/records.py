"""Reads text and label columns from JSONL, CSV and Parquet files; errors name the line of every bad row.

What a row and a text are is the rule of `distft.data.rows`, for corpora and labelled data alike.
"""

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import fsspec

from distft import storage
from distft.data.class_names import NamedClasses, named_classes
from distft.data.compressed import decompressed, lines, read_error, without_compression
from distft.data.parquet_rows import parquet_metadata, parquet_rows
from distft.data.rows import Row, csv_rows, json_rows, missing_column, text_problem
from distft.errors import DataError

_JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PARQUET = ".parquet"
_MAX_SHOWN = 10  # different problems of a file, and lines of each; the others are counted


@dataclass(frozen=True, slots=True)
class Record:
    """The requested columns of one row of a file."""

    line: int  # from 1; of a CSV row that spans several lines, the last; of Parquet the row
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
        return f"{self.path}:{lines[0]}: {problem}{other_lines(lines)}"


def other_lines(lines: Sequence[int]) -> str:
    """What follows a message about the first of these lines: the others, if there are any."""
    shown = lines[1:_MAX_SHOWN]
    rest = f" and {len(lines) - _MAX_SHOWN:,} more" if len(lines) > _MAX_SHOWN else ""
    return f" (Lines {', '.join(map(str, shown))}{rest} too.)" if shown else ""


def read_records(
    path: str,
    *,
    texts: Sequence[str],
    labels: Sequence[str] = (),
    label_lists: Sequence[str] = (),
    separator: str = ",",
    numbers: Sequence[str] = (),
    max_rows: int | None = None,
) -> list[Record]:
    """Read the columns `texts`, `labels`, `label_lists` and `numbers` of the first `max_rows` rows of a file.

    The name's suffix selects JSONL (one object per line), CSV or TSV (with a header), their compression, or
    Parquet; `path` is any fsspec path. A text must be a string; a label may also be an integer or a boolean,
    and is returned in its JSON notation. A list of labels may also be one string, cut at each `separator`,
    and is returned as a JSON array of distinct labels. A number may also be in a string, from which `float`
    reads it, and is finite. Blank lines are not rows.

    Raises `DataError` with file and line: a file that is missing, empty, damaged or of another kind, bad
    JSON or CSV, a missing column, a value of the wrong type.
    """
    errors = RowErrors(path)
    records: list[Record] = []
    columns = [*texts, *labels, *label_lists, *numbers]
    try:
        for line, row in parse_rows(path, columns):
            if max_rows is not None and len(records) + errors.num_errors >= max_rows:
                break
            if isinstance(row, str):
                errors.add(line, row)
                continue
            values = _select_columns(row, texts, labels, numbers)
            if isinstance(values, dict) and label_lists:
                lists = _select_label_lists(row, label_lists, separator)
                values = values | lists if isinstance(lists, dict) else lists
            if isinstance(values, str):
                errors.add(line, values)
            else:
                records.append(Record(line, values))
    except FileNotFoundError:
        raise missing_file(path) from None
    except OSError as error:
        raise read_error(path, error) from error
    errors.raise_if_any()
    if not records:
        raise DataError(f"{path} has no rows.")
    return records


def parse_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[int, Row | str]]:
    """Yield (line, row) of a JSONL, CSV, TSV or Parquet file; in place of a bad row, a message about it.

    Raises `DataError` for a file of another kind, and `OSError`.
    """
    if path.lower().endswith(_PARQUET):
        yield from enumerate(_parquet_rows(path, columns), start=1)
        return
    kind = PurePosixPath(without_compression(path)).suffix.lower()
    if kind not in _JSON_SUFFIXES and kind not in _DELIMITERS:
        raise DataError(
            f"{path}: unknown file type: the name must end in .jsonl, .csv, .tsv or .parquet, "
            f"or in one of the first three with .gz or .zst."
        )
    with open_lines(path) as file_lines:
        if kind in _JSON_SUFFIXES:
            yield from json_rows(file_lines, columns)
        else:
            yield from csv_rows(file_lines, _DELIMITERS[kind], columns)


def _parquet_rows(path: str, columns: Sequence[str]) -> Iterator[Row | str]:
    """The rows; a whole number in a column of classes that the file's metadata names is the class's name."""
    _check_regular(path)
    classes = named_classes(parquet_metadata(path), columns)
    if classes.notes:
        raise DataError(f"{path}: {'; '.join(classes.notes)}: write the file without this metadata.")
    for row in parquet_rows(path, columns):
        yield _with_names(row, classes)


def _with_names(row: Row, classes: NamedClasses) -> Row | str:
    named = {}
    for column, value in row.items():
        try:
            named[column] = classes.label(column, value)
        except ValueError as error:
            return f"{column!r} {error}"
    return named


@contextmanager
def open_lines(path: str) -> Iterator[Iterator[bytes]]:
    """The lines of a file, which may be compressed. Raises `DataError` if it is none, and `OSError`."""
    _check_regular(path)
    with storage.open_read(path) as opened:
        yield lines((data for data, _ in decompressed(opened, path)), path)


def _check_regular(path: str) -> None:
    """Raise `DataError` for a directory, pipe or device; reading one may never end."""
    local = storage.local_path(path)
    if local is not None and local.exists() and not local.is_file():
        what = "a directory" if local.is_dir() else "a pipe, device or socket"
        raise DataError(f"{path} is {what}, not a file: name a file.")


def _select_columns(
    row: dict[str, Any], texts: Sequence[str], labels: Sequence[str], numbers: Sequence[str]
) -> dict[str, str] | str:
    """The requested values of a row, or a message about the first bad one."""
    values = {}
    for column in (*texts, *labels, *numbers):
        if column not in row:
            return missing_column(column, row)
        value = row[column]
        if column in numbers:
            if not _is_number(value):
                return f"{column!r} is {json.dumps(value)[:60]}, but must be a finite number."
            values[column] = str(value)
            continue
        if column in labels:
            value = _label(column, value)
            if isinstance(value, _Problem):
                return str(value)
        elif problem := text_problem(value):
            return f"{column!r} {problem}"
        values[column] = value
    return values


class _Problem(str):
    """A message about a bad value."""


def _label(column: str, value: object) -> str:
    """A label as text, or a `_Problem`."""
    if isinstance(value, int):
        value = json.dumps(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return _Problem(
            f"{column!r} is {'null' if value is None else 'empty'}: every row needs a label. Label it, "
            "remove it, or put unlabelled rows into a stream of their own, with label=null."
        )
    if problem := text_problem(value, "a string or a whole number"):
        return _Problem(f"{column!r} {problem}")
    return str(value)


def _select_label_lists(row: dict[str, Any], columns: Sequence[str], separator: str) -> dict[str, str] | str:
    """The distinct labels in each column, as a JSON array, or a message; an empty list or string has none."""
    lists = {}
    for column in columns:
        if column not in row:
            return missing_column(column, row)
        value = row[column]
        if isinstance(value, str):
            value = [part.strip() for part in value.split(separator)] if value.strip() else []
        if not isinstance(value, list):
            return (
                f"{column!r} is {json.dumps(value)[:60]}, but must be a list of labels (labels=several): an "
                "empty list for a row of no class; unlabelled rows belong into a stream of their own, with "
                "label=null."
            )
        labels = [_label(column, item) for item in value]
        problem = next((label for label in labels if isinstance(label, _Problem)), None)
        if problem is not None:
            return str(problem)
        lists[column] = json.dumps(list(dict.fromkeys(labels)))
    return lists


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def missing_file(path: str) -> DataError:
    """The error for a file that does not exist, which names similar ones beside it."""
    return DataError(f"{path} does not exist.{_similar_files(path)}")


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
