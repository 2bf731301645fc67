"""Reads text and label columns from JSONL, CSV and Parquet files; errors name the line of every bad row.

What a row and a text are is the rule of `distft.data.rows`, for corpora and labelled data alike.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath

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
            in_order = sorted(self.lines.items(), key=lambda item: item[1][0])
            messages = [self._message(*item) for item in in_order[:_MAX_SHOWN]]
            if num_others := sum(len(lines) for _, lines in in_order[_MAX_SHOWN:]):
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
    errors: RowErrors | None = None,
) -> list[Record]:
    """Read the columns `texts`, `labels`, `label_lists` and `numbers` of the first `max_rows` rows of a file.

    The name's suffix selects JSONL (one object per line), CSV or TSV (with a header), their compression, or
    Parquet; `path` is any fsspec path. A text must be a string; a label may also be an integer or a boolean,
    and is returned in its JSON notation. A list of labels may also be one string, cut at each `separator`,
    and is returned as a JSON array of distinct labels. A number may also be in a string, from which `float`
    reads it, and is finite. Blank lines are not rows.

    Raises `DataError` with file and line: a file that is missing, empty, damaged or of another kind, bad
    JSON or CSV, a missing column, a value of the wrong type. With `errors`, those of rows go there instead,
    unless no row is good: so a caller can tell them together with its own.
    """
    found_errors = RowErrors(path) if errors is None else errors
    records: list[Record] = []
    readers: dict[str, Callable[[str, object], str]] = {
        **dict.fromkeys(texts, _text),
        **dict.fromkeys(labels, _label),
        **dict.fromkeys(label_lists, partial(_label_list, separator=separator)),
        **dict.fromkeys(numbers, _number),
    }
    try:
        for number, (line, row) in enumerate(parse_rows(path, list(readers))):
            if max_rows is not None and number >= max_rows:
                break
            values, problems = ({}, [row]) if isinstance(row, str) else _read_columns(row, readers)
            for problem in problems:
                found_errors.add(line, problem)
            if not problems:
                records.append(Record(line, values))
    except FileNotFoundError:
        raise missing_file(path) from None
    except OSError as error:
        raise read_error(path, error) from error
    if errors is None or not records:
        found_errors.raise_if_any()
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


def _read_columns(
    row: Row, readers: Mapping[str, Callable[[str, object], str]]
) -> tuple[dict[str, str], list[str]]:
    """The values of the columns that have readers, and messages about all that are bad."""
    values, problems = {}, []
    for column, read in readers.items():
        if column not in row:
            problems.append(missing_column(column, row))
            continue
        try:
            values[column] = read(column, row[column])
        except ValueError as error:
            problems += str(error).splitlines()
    return values, problems


def _text(column: str, value: object) -> str:
    if problem := text_problem(value):
        raise ValueError(f"{column!r} {problem}")
    return str(value)


def _label(column: str, value: object) -> str:
    """A label as text. Raises `ValueError` for another value."""
    if isinstance(value, int):
        value = json.dumps(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(
            f"{column!r} is {'null' if value is None else 'empty'}: every row needs a label. Label it, "
            "remove it, or put unlabelled rows into a stream of their own, with label=null."
        )
    if problem := text_problem(value, "a string or a whole number"):
        raise ValueError(f"{column!r} {problem}")
    return str(value)


def _label_list(column: str, value: object, separator: str) -> str:
    """The distinct labels, as a JSON array; an empty list or string has none. Raises `ValueError`."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(separator)] if value.strip() else []
    if not isinstance(value, list):
        raise ValueError(
            f"{column!r} is {json.dumps(value)[:60]}, but must be a list of labels (labels=several): an "
            "empty list for a row of no class; unlabelled rows belong into a stream of their own, with "
            "label=null."
        )
    labels, problems = [], []
    for item in value:
        try:
            labels.append(_label(column, item))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(dict.fromkeys(problems)))
    return json.dumps(list(dict.fromkeys(labels)))


def _number(column: str, value: object) -> str:
    if not _is_number(value):
        raise ValueError(f"{column!r} is {json.dumps(value)[:60]}, but must be a finite number.")
    return str(value)


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
