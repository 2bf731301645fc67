"""The zip archive of a torch file: its pickle, and the location of each storage. Decompresses nothing."""

import io
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from distft import storage
from distft.errors import CheckpointError, StorageError, UnreachableError, UnsupportedFormatError

PICKLE = "data.pkl"
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip entry: signature, lengths of name and extra field
# An object takes up to 30 times its opcodes. A model of 10,000 parameters with their optimizer has 5 MB.
_MAX_PICKLE_BYTES = 64 << 20
_LOCAL_SIGNATURE = b"PK\x03\x04"
_ENCRYPTED = 1  # bit of a zip entry's flags
_READ_BYTES = 4 << 20
_BUFFER_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """Location of one storage's bytes in the file."""

    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TorchArchive:
    """What a torch file contains: the pickle, and the storages that it refers to by key."""

    path: str
    num_bytes: int  # of the file
    pickle: bytes
    records: dict[str, StorageRecord]


class _RangeReader(io.RawIOBase):
    """A file that is read by range: `storage.open_read` of a URL fetches 16 MiB at every place."""

    def __init__(self, path: str, num_bytes: int) -> None:
        self._path, self._num_bytes, self._position = path, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        if start + offset < 0:
            raise zipfile.BadZipFile("an offset below zero")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        count = max(min(len(buffer), self._num_bytes - self._position), 0)
        storage.read_into(self._path, self._position, memoryview(buffer)[:count])
        self._position += count
        return count


def read_archive(path: str) -> TorchArchive:
    """Read the archive's directory and its pickle.

    Raises `CheckpointError` for a file that is missing, damaged or not torch's, `UnsupportedFormatError` for
    one in torch's old format or of a big-endian machine.
    """
    with _damage_as_checkpoint_error(path):
        num_bytes = storage.size(path)
        file = io.BufferedReader(_RangeReader(path, num_bytes), _BUFFER_BYTES)
        with zipfile.ZipFile(file) as archive:
            _check_entries(archive, num_bytes, path)
            names = archive.namelist()
            folder = next((name.removesuffix(PICKLE) for name in names if name.endswith(f"/{PICKLE}")), None)
            if folder is None:
                raise CheckpointError(f"{path} is a zip file without {PICKLE}: torch.save did not write it.")
            if f"{folder}byteorder" in names:
                _check_byte_order(archive, f"{folder}byteorder", path)
            size = archive.getinfo(folder + PICKLE).file_size
            if size > _MAX_PICKLE_BYTES:
                raise UnsupportedFormatError(
                    f"{path} has a pickle of {size:,} bytes beside its tensors, and distft reads up to "
                    f"{_MAX_PICKLE_BYTES:,}: save tensors as tensors, not as lists or arrays."
                )
            data = archive.read(folder + PICKLE)
            records = {
                key: _locate(path, info, num_bytes)
                for info in archive.infolist()
                if (key := info.filename.removeprefix(f"{folder}data/")).isdecimal()
            }
    return TorchArchive(path, num_bytes, data, records)


def _check_entries(archive: zipfile.ZipFile, num_bytes: int, path: str) -> None:
    """Raise unless the entries are as torch.save writes them: each of its own name, and as it is."""
    entries = archive.infolist()
    for info in entries:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise CheckpointError(
                f"{path} has the compressed entry {info.filename}: torch.save did not write it."
            )
        if info.flag_bits & _ENCRYPTED:
            raise CheckpointError(
                f"{path} has the encrypted entry {info.filename}, which torch.save does not write."
            )
    if len(archive.NameToInfo) != len(entries):
        raise CheckpointError(f"{path} has two entries of one name: torch.save did not write it.")
    total = sum(info.file_size for info in entries)
    if total > num_bytes:
        raise zipfile.BadZipFile(f"its entries have {total:,} bytes, the file {num_bytes:,}")


def _check_byte_order(archive: zipfile.ZipFile, name: str, path: str) -> None:
    with archive.open(name) as entry:
        order = entry.read(20)
    if order != b"little":
        raise UnsupportedFormatError(
            f"{path} has byte order {order.decode(errors='replace')!r}, but distft reads little-endian "
            "files: load it with torch on a little-endian machine, and save it again."
        )


def _locate(path: str, info: zipfile.ZipInfo, num_bytes: int) -> StorageRecord:
    header = storage.read_range(path, info.header_offset, info.header_offset + LOCAL_HEADER.size)
    if not header.startswith(_LOCAL_SIGNATURE):
        raise zipfile.BadZipFile(f"entry {info.filename} is not where the directory says")
    _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
    offset = info.header_offset + len(header) + name_bytes + extra_bytes
    if offset + info.file_size > num_bytes:
        raise zipfile.BadZipFile(f"entry {info.filename} ends behind the file's end")
    return StorageRecord(offset, info.file_size)


def find_torch_file_damage(path: str) -> list[str]:
    """Problems of a torch file: reads every byte and compares it with the checksums of its zip entries."""
    try:
        with _damage_as_checkpoint_error(path), storage.open_read(path) as file:
            num_bytes = storage.size(path)
            with zipfile.ZipFile(file) as archive:
                _check_entries(archive, num_bytes, path)
                return [
                    problem
                    for info in archive.infolist()
                    for problem in _find_entry_damage(archive, info, path)
                ]
    except CheckpointError as error:
        return [str(error)]


def _find_entry_damage(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: str) -> list[str]:
    try:
        with archive.open(info) as entry:
            while entry.read(_READ_BYTES):
                pass
    except (zipfile.BadZipFile, EOFError) as error:
        return [f"{path} is damaged at {info.filename} ({error}): use another checkpoint."]
    return []


@contextmanager
def _damage_as_checkpoint_error(path: str) -> Iterator[None]:
    """Raise a `CheckpointError` about `path` for anything that zipfile raises for a damaged file."""
    try:
        with storage.unreadable_as_unreachable(path):
            yield
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (CheckpointError, UnreachableError):
        raise
    except (
        zipfile.BadZipFile,
        StorageError,
        IsADirectoryError,
        NotImplementedError,
        RuntimeError,
        OverflowError,
        EOFError,
        ValueError,
        struct.error,
    ) as error:
        raise _not_a_zip(path, error) from error


def _not_a_zip(path: str, error: Exception) -> CheckpointError:
    try:
        with storage.open_read(path) as file:
            head = file.read(64)
    except IsADirectoryError:
        return CheckpointError(f"{path} is a directory, not a file: use another checkpoint.")
    storage.check_not_lfs_pointer(path, head, error=CheckpointError)
    if head.startswith(b"\x80"):
        return UnsupportedFormatError(
            f"{path} is a bare pickle: torch's old format, or not a torch file. If you trust it, load it "
            "with torch.load and save it with torch.save (in DeepSpeed, set "
            "checkpoint.checkpoint_serialization: true)."
        )
    return CheckpointError(f"{path} is damaged or cut short ({error}): use another checkpoint.")
