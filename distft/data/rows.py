"""Rows of JSONL and CSV: parsing, and the checks that every text from a file passes.

One rule for all formats, compressed or not:

- A byte-order mark at the start of a file is not part of its text. UTF-16 and UTF-32 are refused.
- A line ends with LF or CRLF. Blank lines are not rows. Values of columns are taken as they are.
- A text is a string of Unicode characters: bytes that are not UTF-8, and half a character (a lone surrogate,
  `\\ud83d` in JSON), are errors with file and line.
- A column that is missing, or that a row or header names twice, is an error.
- In a corpus, texts that are null or empty (without a character other than white space) are skipped and
  counted. In labelled data a null is an error, and so is a text without tokens: each row must be used.
"""

import codecs
import csv
import difflib
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from distft.data.compressed import MAX_ROW_BYTES

Row = dict[str, Any]

BYTE_ORDER_MARK = codecs.BOM_UTF8
_OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE begins as UTF-16
_MAX_SHOWN = 10  # columns in a message


class _DoubledRow(dict[str, Any]):
    """A JSON object that has some keys twice."""

    doubled: Collection[str] = ()


def encoding_problem(head: bytes) -> str | None:
    """What is wrong with the encoding of a file that starts with `head`, as far as its mark tells."""
    if head.startswith(_OTHER_MARKS):
        return "the file is UTF-16 or UTF-32: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)."
    return None


def text_problem(value: object, expected: str = "a string") -> str | None:
    """What keeps a value from being a text: another type, or half a character; None if it is one."""
    if not isinstance(value, str):
        return f"is {_shown(value)}, but must be {expected}."
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return (
                f"has a lone surrogate, {value[error.start]!a}, at character {error.start}: half of a "
                "character, left by a program that cut a text in the middle. Remove it."
            )
    return None


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "a JSON object" if isinstance(value, dict) else "a JSON array"
    try:
        return json.dumps(value)[:60]
    except (TypeError, ValueError):
        return type(value).__name__


def missing_column(column: str, columns: Iterable[str]) -> str:
    """The message for a row or file without a column."""
    known = list(columns)
    similar = difflib.get_close_matches(column, known[:1000], n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(_safe, similar))}? " if similar else ""
    shown = ", ".join(map(_safe, known[:_MAX_SHOWN])) + ", ..." * (len(known) > _MAX_SHOWN)
    return f"has no column {column!r}; {hint}it has {shown or 'none'}."


def _safe(name: str) -> str:
    return repr(name[:60]) if name.isprintable() else ascii(name[:60])


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        doubled = _DoubledRow(row)
        doubled.doubled = [key for key, number in Counter(key for key, _ in pairs).items() if number > 1]
        return doubled
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)  # 2 us a row more than without


def parse_json_row(line: bytes, columns: Collection[str]) -> Row | str | None:
    """The object in a line of JSONL, None for a blank line, or what is wrong with it.

    Of the keys that it has twice, only `columns` matter.
    """
    if not line.strip():
        return None
    try:
        row = _DECODER.decode(line.decode().strip())
    except (ValueError, RecursionError) as error:
        return _json_problem(line, error)
    if not isinstance(row, dict):
        if isinstance(row, list) and row and isinstance(row[0], dict):
            return "is a JSON array of all rows. " + _ONE_LINE_EACH
        return f"is {_shown(row)}, not an object with named columns."
    if isinstance(row, _DoubledRow) and (twice := sorted(set(row.doubled).intersection(columns))):
        return f"has the key {' and '.join(map(repr, twice))} twice: keep one."
    return row


def _json_problem(line: bytes, error: ValueError | RecursionError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return not_utf8(error)
    if isinstance(error, RecursionError):
        return "is not JSON that can be read: it is nested too deeply. Correct or remove the line."
    if not isinstance(error, json.JSONDecodeError):  # int() refuses more digits, whose conversion is slow
        digits = f"{sys.get_int_max_str_digits():,}"
        return f"has a number of more than {digits} digits. Correct or remove the line."
    if line.strip() in {b"[", b"{", b"[{"}:
        return "is not JSON: a row must be one line. " + _ONE_LINE_EACH
    return f"is not JSON: {error.msg} at character {error.pos}. Correct or remove the line."


_ONE_LINE_EACH = "Write one object per line: jq -c '.[]' rows.json > rows.jsonl (or jq -c . for objects)."


def not_utf8(error: UnicodeDecodeError) -> str:
    """The message for bytes of a line that are not UTF-8."""
    return (
        f"is not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start}): convert the file to UTF-8."
    )


def json_rows(lines: Iterable[bytes], columns: Collection[str]) -> Iterator[tuple[int, Row | str]]:
    """Yield (line, row) of a whole JSONL file; in place of a bad row, a message about it."""
    for number, line in enumerate(lines, start=1):
        if number == 1 and (problem := encoding_problem(line)):
            yield 1, problem
            return
        row = parse_json_row(line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, columns)
        if row is not None:
            yield number, row


def csv_rows(
    lines: Iterable[bytes], delimiter: str, columns: Collection[str]
) -> Iterator[tuple[int, Row | str]]:
    """Yield (line, row) of a whole CSV file with a header; in place of a bad row, a message about it.

    The line is the last one of a row that has several.
    """
    undecodable: list[tuple[int, str]] = []

    def decoded() -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            if number == 1 and (problem := encoding_problem(line)):
                undecodable.append((1, problem))
                return
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                undecodable.append((number, not_utf8(error)))
                yield line.decode("utf-8", errors="replace")

    limit = csv.field_size_limit(MAX_ROW_BYTES)  # the default of 128 KiB is less than a long document
    try:
        reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
        header = next((cells for cells in reader if cells), [])
        problems = [missing_column(name, header) for name in columns if header and name not in header]
        twice = " and ".join(repr(name) for name in columns if header.count(name) > 1)
        problems += [f"the header names the column {twice} twice: keep one."] if twice else []
        if problems:
            yield from ((reader.line_num, problem) for problem in problems)
            return
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
