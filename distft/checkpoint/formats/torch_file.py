"""torch's `.pt` files: read without running their pickles, written without holding their tensors."""

import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.formats.torch_pickle import AnyTensor, pickled
from distft.checkpoint.formats.torch_unpickle import StorageEntry, unpickle
from distft.checkpoint.formats.torch_values import ForeignObject, StoredTensor, StreamedTensor
from distft.checkpoint.unread import UnreadError
from distft.errors import CheckpointError, StorageError, UnreachableError

__all__ = [
    "ForeignObject",
    "StoredTensor",
    "StreamedTensor",
    "read_torch_file",
    "torch_file_faults",
    "write_torch_file",
]

CHUNK_NUMEL = 1 << 20  # elements that are held at a time, some copies over
_PICKLE = "data.pkl"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_LOCAL_SIGNATURE = b"PK\x03\x04"
_ALIGNMENT_BYTES = 64  # of tensors, as torch does it, so that its mmap=True can use them in place
_PADDING_FIELD = 0x4246  # "FB", torch's own mark
_ZIP64_FIELD_BYTES = 20
_READ_BYTES = 4 << 20
_WRITTEN_AT = (1980, 1, 1, 0, 0, 0)  # the zip format's own beginning: the same content gives the same bytes


def read_torch_file(path: str, *, trust: bool = False) -> Any:
    """What a torch file holds, with its tensors as `StoredTensor`; no code of the file is run.

    Raises `CheckpointError` for a file that is absent, damaged, of torch's old format, of another byte order,
    or that names classes which are not known here; with `trust` those are imported, and can run code.
    """
    try:
        with storage.open_read(path) as file, zipfile.ZipFile(file) as archive:
            folder = _folder(archive, path)
            entries = {
                info.filename.removeprefix(f"{folder}data/"): _entry(file, info, path)
                for info in archive.infolist()
                if info.filename.startswith(f"{folder}data/")
            }
            if f"{folder}byteorder" in archive.namelist():
                _check_byte_order(archive.read(f"{folder}byteorder"), path)
            data = archive.read(folder + _PICKLE)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except UnreachableError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, StorageError) as error:
        raise _not_a_zip(path, error) from error
    return unpickle(data, path, entries, trust=trust)


def _folder(archive: zipfile.ZipFile, path: str) -> str:
    for name in archive.namelist():
        if name.endswith(f"/{_PICKLE}"):
            return name.removesuffix(_PICKLE)
    raise CheckpointError(f"{path} is a zip file without {_PICKLE}: torch.save did not write it.")


def _entry(file: BinaryIO, info: zipfile.ZipInfo, path: str) -> StorageEntry:
    if info.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(
            f"{path} has the compressed entry {info.filename}: torch.save did not write it."
        )
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_LOCAL_SIGNATURE):
        raise zipfile.BadZipFile(f"no entry {info.filename} where there should be one")
    _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    return StorageEntry(info.header_offset + len(header) + name_bytes + extra_bytes, info.file_size)


def _check_byte_order(order: bytes, path: str) -> None:
    if order != b"little":
        raise UnreadError(
            f"{path} was written on a machine of byte order {order.decode(errors='replace')!r}; "
            "load it there or with torch, and save it again on a little-endian one."
        )


def _not_a_zip(path: str, error: Exception) -> CheckpointError:
    with storage.open_read(path) as file:
        head = file.read(len(_LOCAL_SIGNATURE))
    if head.startswith(b"\x80"):
        return UnreadError(
            f"{path} is a bare pickle: torch's old format, or no torch file. If you trust it, let torch.load "
            "and torch.save make it new (in DeepSpeed: checkpoint.checkpoint_serialization: true)."
        )
    return CheckpointError(f"{path} is damaged or cut short ({error}): use another checkpoint.")


def torch_file_faults(path: str) -> list[str]:
    """What is wrong with a torch file; every byte of it is read and held against its checksum."""
    try:
        with storage.open_read(path) as file, zipfile.ZipFile(file) as archive:
            return [fault for info in archive.infolist() for fault in _entry_faults(archive, info, path)]
    except FileNotFoundError:
        return [f"{path} does not exist."]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        return [str(_not_a_zip(path, error))]


def _entry_faults(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str) -> list[str]:
    try:
        with archive.open(info) as entry:
            while entry.read(_READ_BYTES):
                pass
    except (zipfile.BadZipFile, EOFError) as error:
        return [f"{path} is damaged at {info.filename} ({error}): use another checkpoint."]
    return []


def write_torch_file(
    path: str, value: Any, *, on_progress: Callable[[int], None] = lambda _num_bytes: None
) -> None:
    """Write what `torch.load(path)` gives back as `value`, in memory of one chunk.

    `value` is plain data whose leaves may be tensors, `StoredTensor`, `StreamedTensor` and `ForeignObject`;
    without the last of these, weights_only=True loads the file. `on_progress` is told the bytes of each
    piece. Raises `TypeError` for other values, `ValueError` where the chunks of a tensor do not add up to it.
    """
    text, tensors = pickled(value)
    with storage.open_write(path, durable=False) as file:
        counter = _CountingWriter(file)
        with zipfile.ZipFile(counter, "w") as archive:  # type: ignore[call-overload]  # a writer is enough
            archive.writestr(zipfile.ZipInfo(f"archive/{_PICKLE}", _WRITTEN_AT), text)
            archive.writestr(zipfile.ZipInfo("archive/byteorder", _WRITTEN_AT), b"little")
            for number, tensor in enumerate(tensors):
                _write_tensor(archive, counter, f"archive/data/{number}", tensor, on_progress)
            archive.writestr(zipfile.ZipInfo("archive/version", _WRITTEN_AT), b"3\n")
    on_progress(len(text))


class _CountingWriter:
    """What `zipfile` needs of a file that can only grow, and where it stands."""

    def __init__(self, file: storage.Writer) -> None:
        self._file = file
        self.num_bytes = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        self._file.write(data)
        count = memoryview(data).nbytes
        self.num_bytes += count
        return count

    def flush(self) -> None:
        """The storage does that when it commits the file."""


def _write_tensor(
    archive: zipfile.ZipFile,
    counter: _CountingWriter,
    name: str,
    tensor: AnyTensor,
    on_progress: Callable[[int], None],
) -> None:
    numel = tensor.numel() if isinstance(tensor, Tensor) else tensor.numel
    info = zipfile.ZipInfo(name, _WRITTEN_AT)
    info.file_size = numel * tensor.dtype.itemsize
    is_zip64 = info.file_size * 2 > zipfile.ZIP64_LIMIT
    header_bytes = counter.num_bytes + _LOCAL_HEADER.size + len(name) + 4
    padding = -(header_bytes + _ZIP64_FIELD_BYTES * is_zip64) % _ALIGNMENT_BYTES
    info.extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    num_written = 0
    with archive.open(info, "w", force_zip64=is_zip64) as entry:
        for chunk in _chunks(tensor):
            if chunk.dtype != tensor.dtype:
                raise ValueError(f"{name} is of {tensor.dtype}, and was given {chunk.dtype}.")
            raw: Any = chunk.contiguous().view(torch.uint8).numpy()
            entry.write(memoryview(raw))
            num_written += chunk.numel()
            on_progress(raw.nbytes)
    if num_written != numel:
        raise ValueError(f"{name} has {numel} elements, and was given {num_written}.")


def _chunks(tensor: AnyTensor) -> Iterator[Tensor]:
    if isinstance(tensor, StreamedTensor):
        yield from (chunk for chunk in tensor.chunks() if chunk.numel())
    elif isinstance(tensor, StoredTensor):
        for start in range(0, tensor.numel, CHUNK_NUMEL):
            yield tensor.read(start, min(start + CHUNK_NUMEL, tensor.numel))
    elif tensor.numel():
        yield from (piece.cpu() for piece in torch.split(tensor.detach().reshape(-1), CHUNK_NUMEL))
