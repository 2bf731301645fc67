"""One rank's fragments as a safetensors file: a JSON header and plain bytes, no code.

Keys are `parameter/state/start`; each tensor is 1-D. Any safetensors reader opens these files.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distft.checkpoint.fragments import Fragment
from distft.checkpoint.manifest import FileRecord
from distft.errors import CheckpointError, StorageError, UnreachableError
from distft.storage import ChecksumWriter, open_write, read_into, read_range

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 1 << 30
_COPY_NUMEL = 1 << 24  # elements copied from a device at a time


@dataclass(frozen=True, slots=True)
class FragmentLocation:
    """Where a file stores a fragment."""

    dtype: torch.dtype
    start: int  # elements [start, stop) of the parameter
    stop: int
    offset: int  # of the first byte, in the file


@dataclass(frozen=True, slots=True)
class LazyFragment:
    """A fragment to be written, whose values are produced chunk by chunk, in order."""

    parameter: str
    state: str
    start: int
    stop: int
    dtype: torch.dtype
    chunks: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, fragment: Fragment) -> "LazyFragment":
        """A fragment in memory; a chunk at a time is copied from its device."""
        values = fragment.values.detach()
        return cls(
            fragment.parameter,
            fragment.state,
            fragment.start,
            fragment.stop,
            values.dtype,
            lambda: torch.split(values, _COPY_NUMEL),
        )


def write_rank_file(
    path: str, fragments: Sequence[LazyFragment], *, name: str, durable: bool = True
) -> FileRecord:
    """Write a rank's fragments to `path`; returns the record of the file, which the manifest calls `name`.

    `durable`: return only when the disk has the data.
    """
    header: dict[str, object] = {"__metadata__": {"format": "distft-fragments"}}
    offset = 0
    for fragment in fragments:
        num_bytes = (fragment.stop - fragment.start) * fragment.dtype.itemsize
        header[f"{fragment.parameter}/{fragment.state}/{fragment.start}"] = {
            "dtype": _CODES[fragment.dtype],
            "shape": [fragment.stop - fragment.start],
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format requires data to be aligned to 8 bytes
    with open_write(path, durable=durable) as file:
        writer = ChecksumWriter(file)
        writer.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for fragment in fragments:
            for chunk in fragment.chunks():
                writer.write(_bytes_of(chunk))
    return FileRecord(
        name=name,
        num_bytes=writer.num_bytes,
        checksum=writer.checksum,
        intervals={fragment.parameter: (fragment.start, fragment.stop) for fragment in fragments},
    )


def _bytes_of(values: Tensor) -> memoryview:
    flat: Any = values.cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(flat)


def read_header(path: str) -> dict[tuple[str, str], FragmentLocation]:
    """Location of each (parameter, state) in a rank's file.

    Raises `CheckpointError` if the file is missing or damaged.
    """
    try:
        length = int.from_bytes(read_range(path, 0, _LENGTH_BYTES), "little")
        if not 0 < length <= _MAX_HEADER_BYTES:
            raise ValueError(f"its header would be {length} bytes long")
        raw: Mapping[str, Mapping[str, Any]] = json.loads(
            bytes(read_range(path, _LENGTH_BYTES, _LENGTH_BYTES + length))
        )
        return dict(_locations(raw, _LENGTH_BYTES + length))
    except UnreachableError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; use another checkpoint.") from None
    except (ValueError, KeyError, TypeError, AttributeError, StorageError) as error:
        raise CheckpointError(
            f"{path} is not a rank's file ({error}): damaged; use another checkpoint."
        ) from None


def _locations(
    header: Mapping[str, Mapping[str, Any]], data_offset: int
) -> Iterator[tuple[tuple[str, str], FragmentLocation]]:
    for key, tensor in header.items():
        if key == "__metadata__":
            continue
        parameter, state, start = key.rsplit("/", 2)
        begin, end = tensor["data_offsets"]
        dtype = _DTYPES[str(tensor["dtype"])]
        stop = int(start) + (end - begin) // dtype.itemsize
        yield (parameter, state), FragmentLocation(dtype, int(start), stop, data_offset + begin)


def read_values(path: str, location: FragmentLocation, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the parameter, from the fragment at `location`; reads no other bytes."""
    offset = location.offset + (start - location.start) * location.dtype.itemsize
    return read_elements(path, offset, location.dtype, stop - start)


def read_elements(path: str, offset: int, dtype: torch.dtype, numel: int) -> Tensor:
    """`numel` elements from byte `offset` of a file on: 1-D, in newly allocated memory."""
    values = torch.empty(numel, dtype=dtype)
    if numel:
        raw: Any = values.view(torch.uint8).numpy()
        read_into(path, offset, memoryview(raw))
    return values
