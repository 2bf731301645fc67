"""Reads sentences, each with its words and their labels, from JSONL and from columns as CoNLL's."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from distft.data.compressed import read_error, without_compression
from distft.data.records import RowErrors, missing_file, open_lines
from distft.data.rows import encoding_problem, json_rows, missing_column, not_utf8, text_problem
from distft.errors import DataError

_JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
_COLUMN_SUFFIXES = {".conll", ".iob", ".iob2", ".bio", ".txt", ".tsv"}
_DOCUMENT_START = "-DOCSTART-"  # a word of CoNLL 2003 that is none


@dataclass(frozen=True, slots=True)
class Sentence:
    """The words of one sentence; `labels` is empty if none were asked for."""

    line: int  # of the file, from 1; in columns, that of the first word
    words: Sequence[str]
    labels: Sequence[str]


def read_sentences(
    path: str,
    *,
    tokens: str,
    labels: str | None,
    token_column: int,
    label_column: int,
    max_rows: int | None = None,
    errors: RowErrors | None = None,
) -> list[Sentence]:
    """The first `max_rows` sentences of a file.

    JSONL has a list of words in `tokens` and, unless `labels` is None, one as long there. A file whose name
    ends in .conll, .iob, .iob2, .bio, .txt or .tsv has a word a line, its columns apart by tabs or by spaces,
    and an empty line behind each sentence. Raises one `DataError` with file and line of every problem; with
    `errors`, those of sentences go there instead, unless none is good.
    """
    kind = PurePosixPath(without_compression(path)).suffix.lower()
    if kind not in _JSON_SUFFIXES | _COLUMN_SUFFIXES:
        raise DataError(
            f"{path}: unknown file type: the name must end in .jsonl, {', '.join(sorted(_COLUMN_SUFFIXES))}, "
            "or one of these with .gz or .zst."
        )
    found_errors, found = RowErrors(path) if errors is None else errors, []
    num_bad = 0
    try:
        with open_lines(path) as lines:
            if kind in _JSON_SUFFIXES:
                items = _json_sentences(lines, tokens, labels)
            else:
                items = _column_sentences(lines, token_column, None if labels is None else label_column)
            for line, item in items:
                if isinstance(item, Sentence):
                    found.append(item)
                else:
                    num_bad += 1
                    for problem in item:
                        found_errors.add(line, problem)
                if max_rows is not None and len(found) + num_bad >= max_rows:
                    break
    except FileNotFoundError:
        raise missing_file(path) from None
    except OSError as error:
        raise read_error(path, error) from error
    if errors is None or not found:
        found_errors.raise_if_any()
    if not found:
        raise DataError(f"{path} has no sentences.")
    return found


def _json_sentences(
    lines: Iterable[bytes], tokens: str, labels: str | None
) -> Iterator[tuple[int, Sentence | list[str]]]:
    """Of each line a sentence, or all that is wrong with it."""
    columns = [tokens, *([] if labels is None else [labels])]
    for line, row in json_rows(lines, columns):
        if isinstance(row, str):
            yield line, [row]
            continue
        problems = [problem for column in columns for problem in _list_problems(row, column)]
        if problems:
            yield line, problems
            continue
        words, own = row[tokens], [] if labels is None else row[labels]
        if labels is not None and len(words) != len(own):
            problems = [f"{len(words):,} {tokens!r} and {len(own):,} {labels!r}: each word needs one label."]
        yield line, problems or Sentence(line, words, own)


def _list_problems(row: dict[str, Any], column: str) -> Iterator[str]:
    """What keeps a column from being a list of texts that are not empty."""
    value = row.get(column)
    if column not in row:
        yield missing_column(column, row)
    elif not isinstance(value, list):
        yield f"{column!r} must be a list of strings, with one for each word."
    elif not value:
        yield f"{column!r} is empty: a sentence needs words. Remove the line."
    else:
        for place, item in enumerate(value, start=1):
            if problem := text_problem(item):
                yield f"{column!r}: entry {place} {problem}"
            elif not item.strip():
                yield f"{column!r}: entry {place} is empty."


def _column_sentences(
    lines: Iterable[bytes], token_column: int, label_column: int | None
) -> Iterator[tuple[int, Sentence | list[str]]]:
    words: list[str] = []
    labels: list[str] = []
    first = 0
    for number, raw in enumerate([*lines, b""], start=1):
        if number == 1 and (wrong := encoding_problem(raw)):
            yield 1, [wrong]
            return
        try:
            cells = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n").strip("\ufeff")
        except UnicodeDecodeError as error:
            yield number, [not_utf8(error)]
            continue
        columns = cells.split("\t") if "\t" in cells else cells.split()
        if not "".join(columns).strip() or columns[0] == _DOCUMENT_START:
            if words:
                yield first, Sentence(first, words, labels)
            words, labels = [], []
            continue
        picked = _pick(columns, token_column, label_column)
        if isinstance(picked, str):
            yield number, [picked]
            continue
        first = first if words else number
        words.append(picked[0])
        labels += picked[1:]


def _pick(columns: Sequence[str], token_column: int, label_column: int | None) -> list[str] | str:
    """The word, and its label if there is one, or a message."""
    wanted = [token_column, *([] if label_column is None else [label_column])]
    if label_column is not None and len(columns) < 2:
        return f"has the word {columns[0]!r} alone, and no label behind it."
    try:
        picked = [columns[place].strip() for place in wanted]
    except IndexError:
        return f"has {len(columns)} columns, and columns {' and '.join(map(str, wanted))} are read (from 0)."
    if not all(picked):
        return "has an empty column where a word or a label is read."
    return picked
