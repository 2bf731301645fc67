"""Writes torch files as torch.save does, chunk by chunk."""

import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.formats.torch_file.archive import LOCAL_HEADER, PICKLE
from distft.checkpoint.formats.torch_file.pickler import WritableTensor, dump_pickle
from distft.checkpoint.formats.torch_file.values import StoredTensor, StreamedTensor
from distft.checkpoint.rank_file import bytes_of

CHUNK_NUMEL = 1 << 20  # elements in memory at a time; a few copies of them exist
_ALIGNMENT_BYTES = 64  # of tensors, as torch aligns them, so that torch.load(mmap=True) works
_PADDING_FIELD = 0x4246  # "FB", the extra field that torch pads with
_ZIP64_FIELD_BYTES = 20
_MODIFIED_AT = (1980, 1, 1, 0, 0, 0)  # zip's epoch, not the clock: equal contents give equal bytes


def write_torch_file(
    path: str, value: Any, *, on_progress: Callable[[int], None] = lambda _num_bytes: None
) -> None:
    """Write `value` as torch.save does, with only one chunk of a tensor in memory.

    `value` is plain data whose leaves may be tensors, `StoredTensor`, `StreamedTensor` and `OpaqueObject`;
    torch.load(weights_only=True) reads the file if it contains no `OpaqueObject`. `on_progress` gets the
    number of bytes of each write. Raises `TypeError` for other values, `ValueError` if a tensor's chunks do
    not match its dtype or number of elements.
    """
    text, tensors = dump_pickle(value)
    with storage.open_write(path, durable=False) as file:
        counter = _CountingWriter(file, on_progress)
        with zipfile.ZipFile(counter, "w") as archive:  # type: ignore[call-overload]  # a writer is enough
            archive.writestr(zipfile.ZipInfo(f"archive/{PICKLE}", _MODIFIED_AT), text)
            archive.writestr(zipfile.ZipInfo("archive/byteorder", _MODIFIED_AT), b"little")
            for number, tensor in enumerate(tensors):
                _write_tensor(archive, counter, f"archive/data/{number}", tensor)
            archive.writestr(zipfile.ZipInfo("archive/version", _MODIFIED_AT), b"3\n")


class _CountingWriter:
    """The append-only file that `zipfile` writes to; counts the bytes."""

    def __init__(self, file: storage.Writer, on_progress: Callable[[int], None]) -> None:
        self._file = file
        self._on_progress = on_progress
        self.num_bytes = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        self._file.write(data)
        count = memoryview(data).nbytes
        self.num_bytes += count
        self._on_progress(count)
        return count

    def flush(self) -> None:
        """Does nothing: the storage flushes when it commits the file."""


def _write_tensor(
    archive: zipfile.ZipFile, counter: _CountingWriter, name: str, tensor: WritableTensor
) -> None:
    numel = tensor.numel() if isinstance(tensor, Tensor) else tensor.numel
    info = zipfile.ZipInfo(name, _MODIFIED_AT)
    info.file_size = numel * tensor.dtype.itemsize
    is_zip64 = info.file_size * 2 > zipfile.ZIP64_LIMIT
    header_bytes = counter.num_bytes + LOCAL_HEADER.size + len(name) + 4
    padding = -(header_bytes + _ZIP64_FIELD_BYTES * is_zip64) % _ALIGNMENT_BYTES
    info.extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    num_written = 0
    with archive.open(info, "w", force_zip64=is_zip64) as entry:
        for chunk in _chunks(tensor):
            if chunk.dtype != tensor.dtype:
                raise ValueError(f"{name} is of {tensor.dtype}, but a chunk of {chunk.dtype} was given.")
            entry.write(bytes_of(chunk))
            num_written += chunk.numel()
    if num_written != numel:
        raise ValueError(f"{name} has {numel} elements, but {num_written} were given.")


def _chunks(tensor: WritableTensor) -> Iterator[Tensor]:
    if isinstance(tensor, StreamedTensor):
        yield from (chunk for chunk in tensor.chunks() if chunk.numel())
    elif isinstance(tensor, StoredTensor):
        for start in range(0, tensor.numel, CHUNK_NUMEL):
            yield tensor.read(start, min(start + CHUNK_NUMEL, tensor.numel))
    elif tensor.numel():
        yield from torch.split(tensor.detach().reshape(-1), CHUNK_NUMEL)
