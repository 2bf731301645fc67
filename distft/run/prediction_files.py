"""The file that `distft predict` writes, made of blocks of predictions."""

import csv
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distft import storage
from distft.errors import ConfigError
from distft.objective.token_classification import SPANS
from distft.run.block_files import json_line
from distft.run.embedding_files import ParquetSink, check_writable

OUTPUT_TYPES = (".jsonl", ".csv", ".tsv", ".parquet")
_ROWS_OF_GROUP = 8192  # of a Parquet file
MESSAGES = "messages"  # the column of a conversation
_SEPARATOR = "|"  # between the labels of a row, in CSV


def check_output(output: str) -> None:
    """Raise `ConfigError` for another kind of file, one that exists, or one that cannot be written."""
    if PurePosixPath(output).suffix.lower() not in OUTPUT_TYPES:
        raise ConfigError(
            f"--output {output} must end in {', '.join(OUTPUT_TYPES)}: that says what is written."
        )
    if storage.exists(output):
        raise ConfigError(
            f"--output {output} exists and is not overwritten: remove it, or choose another output."
        )
    if storage.local_path(output) is not None:
        check_writable(output, output)


def write_output(output: str, predictions: Iterator[Mapping[str, Any]]) -> None:
    """Write all predictions to one file, which appears when it is complete."""
    suffix = PurePosixPath(output).suffix.lower()
    with storage.open_write(output) as writer:
        if suffix == ".parquet":
            _write_parquet(writer, predictions)
        elif suffix == ".jsonl":
            for prediction in predictions:
                writer.write(json_line(prediction))
        else:
            _write_csv(writer, predictions, "," if suffix == ".csv" else "\t")


def _write_csv(writer: Any, predictions: Iterator[Mapping[str, Any]], delimiter: str) -> None:
    text = io.StringIO()
    table: Any = None
    for prediction in predictions:
        row = _flat(_in_cells(prediction))
        if table is None:
            table = csv.DictWriter(text, list(row), delimiter=delimiter, lineterminator="\n")
            table.writeheader()
        table.writerow(row)
        writer.write(text.getvalue().encode())
        text.seek(0)
        text.truncate()


def _flat(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """A column for each label's probability, and several labels in one cell."""
    row: dict[str, Any] = {}
    for name, value in prediction.items():
        if isinstance(value, Mapping):
            row |= {f"probability of {label}": number for label, number in value.items()}
        else:
            row[name] = _joined(value) if isinstance(value, list) else value
    return row


def _joined(values: list[str]) -> str:
    """Values in one cell; as JSON if one of them has the mark that separates them."""
    if any(_SEPARATOR in value for value in values):
        return json.dumps(values, ensure_ascii=False)
    return _SEPARATOR.join(values)


def _in_cells(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """The same with spans and messages as JSON: a column has one type, which a row may not tell."""
    return {
        name: json.dumps(value) if name in {SPANS, MESSAGES} else value for name, value in prediction.items()
    }


def _write_parquet(writer: Any, predictions: Iterator[Mapping[str, Any]]) -> None:
    file: Any = None
    try:
        while group := list(itertools.islice(predictions, _ROWS_OF_GROUP)):
            cells = [_in_cells(prediction) for prediction in group]
            table = pa.Table.from_pylist(cells, schema=None if file is None else file.schema)
            if file is None:
                file = pq.ParquetWriter(ParquetSink(writer), table.schema)
            file.write_table(table)
    finally:
        if file is not None:
            file.close()
