"""A file at a URL of which only the ranges that are read are fetched, each in one request."""

import io
from typing import Any, BinaryIO, cast

from distft import storage
from distft.data.corpus_listing import SourceFile


class RangeFile(io.RawIOBase):
    """For readers that know what they need, as of Parquet: reading ahead would fetch much more."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._file.size - self._position))
        if count:
            storage.read_into(self._file.url, self._position, view[:count])
        self._position += count
        return count


def open_ranges(file: SourceFile) -> BinaryIO:
    """Open a file for reading here and there."""
    if storage.is_url(file.url):
        return cast("BinaryIO", RangeFile(file))
    return storage.open_read(file.url)
