"""Pieces of tokenized text, and files in which they wait for their turn if they do not fit into memory."""

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from distft.storage import full_disk_as_storage_error


@dataclass(frozen=True, slots=True)
class EncodedDocuments:
    """The concatenated tokens of some documents."""

    ids: NDArray[Any]
    document_starts: NDArray[np.int64]  # positions in `ids` of the first token of each document
    num_bytes: int  # of the UTF-8 text


@dataclass(frozen=True, slots=True)
class TokenizedPiece:
    """Documents of one part of a corpus chunk, by split."""

    source_bytes: int  # of the part, with its last piece
    train: EncodedDocuments
    validation: EncodedDocuments
    ends_part: bool
    ends_chunk: bool = False
    skipped: dict[str, int] = field(default_factory=dict)  # rows without text, with the last piece

    @property
    def num_result_bytes(self) -> int:
        """Size in memory."""
        return sum(split.ids.nbytes + split.document_starts.nbytes for split in (self.train, self.validation))


@dataclass(frozen=True, slots=True)
class SpilledPiece:
    """A piece whose arrays are in a file, one after the other."""

    path: str
    offset: int
    dtype: str  # of the ids
    lengths: tuple[int, int, int, int]  # of ids and document starts of both splits
    num_bytes: tuple[int, int]  # of text, by split
    source_bytes: int
    ends_part: bool
    skipped: dict[str, int]

    def load(self) -> TokenizedPiece:
        """Read the piece."""
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            splits = [
                EncodedDocuments(
                    np.fromfile(file, self.dtype, self.lengths[2 * index]),
                    np.fromfile(file, np.int64, self.lengths[2 * index + 1]),
                    self.num_bytes[index],
                )
                for index in range(2)
            ]
        return TokenizedPiece(self.source_bytes, splits[0], splits[1], self.ends_part, skipped=self.skipped)


class SpillFile:
    """A file for the pieces of one task, created when the first is written."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def write(self, piece: TokenizedPiece) -> SpilledPiece:
        """Append `piece`. Raises `StorageError` when the disk is full."""
        splits = (piece.train, piece.validation)
        arrays = [array for split in splits for array in (split.ids, split.document_starts)]
        with full_disk_as_storage_error(self._path, piece.num_result_bytes):
            self._file = self._file or Path(self._path).open("wb")  # noqa: SIM115 - closed by __exit__
            offset = self._file.tell()
            for array in arrays:
                self._file.write(array.data)
            self._file.flush()
        return SpilledPiece(
            path=self._path,
            offset=offset,
            dtype=arrays[0].dtype.str,
            lengths=(len(arrays[0]), len(arrays[1]), len(arrays[2]), len(arrays[3])),
            num_bytes=(splits[0].num_bytes, splits[1].num_bytes),
            source_bytes=piece.source_bytes,
            ends_part=piece.ends_part,
            skipped=piece.skipped,
        )

    def __enter__(self) -> "SpillFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
