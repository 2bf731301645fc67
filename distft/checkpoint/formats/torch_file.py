"""Reads torch's `.pt` files without running their pickles, and writes them chunk by chunk."""

import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.formats.torch_pickle import WritableTensor, dump_pickle
from distft.checkpoint.formats.torch_unpickle import StorageEntry, load_pickle
from distft.checkpoint.formats.torch_values import StoredTensor, StreamedTensor
from distft.errors import CheckpointError, StorageError, UnreachableError, UnsupportedFormatError

CHUNK_NUMEL = 1 << 20  # elements in memory at a time; a few copies of them exist
_PICKLE = "data.pkl"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, lengths of name and extra field
_LOCAL_SIGNATURE = b"PK\x03\x04"
_ALIGNMENT_BYTES = 64  # of tensors, as torch aligns them, so that torch.load(mmap=True) works
_PADDING_FIELD = 0x4246  # "FB", the extra field that torch pads with
_ZIP64_FIELD_BYTES = 20
_READ_BYTES = 4 << 20
_MODIFIED_AT = (1980, 1, 1, 0, 0, 0)  # zip's epoch, not the clock: equal contents give equal bytes


def read_torch_file(path: str, *, trust: bool = False) -> Any:
    """The value in a torch file, with tensors as `StoredTensor`. No code from the file runs.

    Raises `CheckpointError` for a file that is missing, damaged, in torch's old format, big-endian, or that
    names unknown classes. `trust` imports these classes instead, which can run code.
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
    return load_pickle(data, path, entries, trust=trust)


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
        raise zipfile.BadZipFile(f"entry {info.filename} is not where the directory says")
    _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    return StorageEntry(info.header_offset + len(header) + name_bytes + extra_bytes, info.file_size)


def _check_byte_order(order: bytes, path: str) -> None:
    if order != b"little":
        raise UnsupportedFormatError(
            f"{path} has byte order {order.decode(errors='replace')!r}, but distft reads little-endian "
            "files: load it with torch on a little-endian machine, and save it again."
        )


def _not_a_zip(path: str, error: Exception) -> CheckpointError:
    with storage.open_read(path) as file:
        head = file.read(len(_LOCAL_SIGNATURE))
    if head.startswith(b"\x80"):
        return UnsupportedFormatError(
            f"{path} is a bare pickle: torch's old format, or not a torch file. If you trust it, load it "
            "with torch.load and save it with torch.save (in DeepSpeed, set "
            "checkpoint.checkpoint_serialization: true)."
        )
    return CheckpointError(f"{path} is damaged or cut short ({error}): use another checkpoint.")


def find_torch_file_damage(path: str) -> list[str]:
    """Problems of a torch file: reads every byte and compares it with the checksums of its zip entries."""
    try:
        with storage.open_read(path) as file, zipfile.ZipFile(file) as archive:
            return [
                problem for info in archive.infolist() for problem in _find_entry_damage(archive, info, path)
            ]
    except FileNotFoundError:
        return [f"{path} does not exist."]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        return [str(_not_a_zip(path, error))]


def _find_entry_damage(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str) -> list[str]:
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
    """Write `value` as torch.save does, with only one chunk of a tensor in memory.

    `value` is plain data whose leaves may be tensors, `StoredTensor`, `StreamedTensor` and `OpaqueObject`;
    torch.load(weights_only=True) reads the file if it contains no `OpaqueObject`. `on_progress` gets the
    number of bytes of each chunk. Raises `TypeError` for other values, `ValueError` if a tensor's chunks do
    not match its dtype or number of elements.
    """
    text, tensors = dump_pickle(value)
    with storage.open_write(path, durable=False) as file:
        counter = _CountingWriter(file)
        with zipfile.ZipFile(counter, "w") as archive:  # type: ignore[call-overload]  # a writer is enough
            archive.writestr(zipfile.ZipInfo(f"archive/{_PICKLE}", _MODIFIED_AT), text)
            archive.writestr(zipfile.ZipInfo("archive/byteorder", _MODIFIED_AT), b"little")
            for number, tensor in enumerate(tensors):
                _write_tensor(archive, counter, f"archive/data/{number}", tensor, on_progress)
            archive.writestr(zipfile.ZipInfo("archive/version", _MODIFIED_AT), b"3\n")
    on_progress(len(text))


class _CountingWriter:
    """The append-only file that `zipfile` writes to; counts the bytes."""

    def __init__(self, file: storage.Writer) -> None:
        self._file = file
        self.num_bytes = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        self._file.write(data)
        count = memoryview(data).nbytes
        self.num_bytes += count
        return count

    def flush(self) -> None:
        """Does nothing: the storage flushes when it commits the file."""


def _write_tensor(
    archive: zipfile.ZipFile,
    counter: _CountingWriter,
    name: str,
    tensor: WritableTensor,
    on_progress: Callable[[int], None],
) -> None:
    numel = tensor.numel() if isinstance(tensor, Tensor) else tensor.numel
    info = zipfile.ZipInfo(name, _MODIFIED_AT)
    info.file_size = numel * tensor.dtype.itemsize
    is_zip64 = info.file_size * 2 > zipfile.ZIP64_LIMIT
    header_bytes = counter.num_bytes + _LOCAL_HEADER.size + len(name) + 4
    padding = -(header_bytes + _ZIP64_FIELD_BYTES * is_zip64) % _ALIGNMENT_BYTES
    info.extra = struct.pack("<HH", _PADDING_FIELD, padding) + bytes(padding)
    num_written = 0
    with archive.open(info, "w", force_zip64=is_zip64) as entry:
        for chunk in _chunks(tensor):
            if chunk.dtype != tensor.dtype:
                raise ValueError(f"{name} is of {tensor.dtype}, but a chunk of {chunk.dtype} was given.")
            raw: Any = chunk.contiguous().view(torch.uint8).numpy()
            entry.write(memoryview(raw))
            num_written += chunk.numel()
            on_progress(raw.nbytes)
    if num_written != numel:
        raise ValueError(f"{name} has {numel} elements, but {num_written} were given.")


def _chunks(tensor: WritableTensor) -> Iterator[Tensor]:
    if isinstance(tensor, StreamedTensor):
        yield from (chunk for chunk in tensor.chunks() if chunk.numel())
    elif isinstance(tensor, StoredTensor):
        for start in range(0, tensor.numel, CHUNK_NUMEL):
            yield tensor.read(start, min(start + CHUNK_NUMEL, tensor.numel))
    elif tensor.numel():
        yield from (chunk.cpu() for chunk in torch.split(tensor.detach().reshape(-1), CHUNK_NUMEL))
