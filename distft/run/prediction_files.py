"""Files of predictions: blocks of rows that survive an interruption, and the output made of them."""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distft import storage
from distft.errors import ConfigError
from distft.objective.token_classification import SPANS
from distft.run.embedding_files import ParquetSink, check_writable
from distft.storage import checksum_of_bytes

OUTPUT_TYPES = (".jsonl", ".csv", ".tsv", ".parquet")
_IDENTITY = "predictions.json"
_ROWS_OF_GROUP = 8192  # of a Parquet file
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


class BlockFiles:
    """The predictions of blocks of rows, in `output`.parts: each file is complete or not there."""

    def __init__(self, output: str, identity: Mapping[str, Any]) -> None:
        """`identity` is what the predictions depend on."""
        self._directory = f"{output}.parts"
        self._identity = json.dumps(identity, indent=1, sort_keys=True).encode()

    @property
    def directory(self) -> str:
        """Where the blocks are."""
        return self._directory

    def stored_identity(self) -> dict[str, Any] | None:
        """That of the blocks that are there; None if there are none, {} if it cannot be read."""
        path = storage.join(self._directory, _IDENTITY)
        if not storage.exists(path):
            return None
        try:
            stored = json.loads(storage.read_bytes(path))
        except ValueError:
            return {}
        return stored if isinstance(stored, dict) else {}

    def open(self) -> None:
        """Begin, or go on. Raises `ConfigError` if the directory has the blocks of other predictions."""
        path = storage.join(self._directory, _IDENTITY)
        if storage.exists(self._directory) and not storage.is_directory(self._directory):
            raise ConfigError(
                f"{self._directory} is a file, and a directory is needed: choose another output."
            )
        if storage.exists(path):
            if storage.read_bytes(path) == self._identity:
                return
            raise ConfigError(
                f"{self._directory} has predictions of another model, other data or other settings, which an "
                "interrupted command left: repeat that command, remove it, or choose another output."
            )
        if storage.list_names(self._directory):
            raise ConfigError(f"{self._directory} is no directory of distft: choose another output.")
        storage.make_directory(self._directory)
        storage.commit_bytes(path, self._identity)

    def _path(self, start: int) -> str:
        return storage.join(self._directory, f"rows_{start:012d}.jsonl")

    def has(self, start: int, num_rows: int) -> bool:
        """Whether the block is there, whole and unchanged; one that is damaged is to be written again."""
        path = self._path(start)
        if storage.is_directory(path):
            raise ConfigError(f"{path} is a directory: remove it.")
        if not storage.exists(path):
            return False
        content, checksum = self._parts(path)
        return checksum_of_bytes(content).encode() == checksum and content.count(b"\n") == num_rows

    def _parts(self, path: str) -> tuple[bytes, bytes]:
        """A line of JSON for each row, and the last line: the checksum of these."""
        content, newline, checksum = storage.read_bytes(path).removesuffix(b"\n").rpartition(b"\n")
        return content + newline, checksum

    def write(self, start: int, predictions: Iterable[Mapping[str, Any]]) -> None:
        content = b"".join(_json_line(prediction) for prediction in predictions)
        storage.commit_bytes(self._path(start), content + checksum_of_bytes(content).encode() + b"\n")

    def read(self, start: int) -> Iterator[dict[str, Any]]:
        """The predictions of a block that `has` finds whole."""
        content, _ = self._parts(self._path(start))
        for line in content.decode().split("\n")[:-1]:
            yield json.loads(line)

    def remove(self, starts: Iterable[int]) -> None:
        """Remove these blocks, and the directory if nothing else is in it."""
        names = [*(self._path(start).rpartition("/")[2] for start in starts), _IDENTITY]
        storage.remove_files(self._directory, names)


def _json_line(prediction: Mapping[str, Any]) -> bytes:
    return (json.dumps(prediction, ensure_ascii=False) + "\n").encode()


def write_output(output: str, predictions: Iterator[Mapping[str, Any]]) -> None:
    """Write all predictions to one file, which appears when it is complete."""
    suffix = PurePosixPath(output).suffix.lower()
    with storage.open_write(output) as writer:
        if suffix == ".parquet":
            _write_parquet(writer, predictions)
        elif suffix == ".jsonl":
            for prediction in predictions:
                writer.write(_json_line(prediction))
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
            row[name] = _SEPARATOR.join(value) if isinstance(value, list) else value
    return row


def _in_cells(prediction: Mapping[str, Any]) -> dict[str, Any]:
    """The same with spans as JSON: a column has one type, which rows without a span do not tell."""
    return {name: json.dumps(value) if name == SPANS else value for name, value in prediction.items()}


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
