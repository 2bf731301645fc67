"""One rank's fragments as a safetensors file: plain bytes behind a JSON header; nothing in it can run.

Keys are `parameter/state/start`; each tensor is 1-D. Any safetensors reader opens these files.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distft.checkpoint.fragments import Fragment
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
class Place:
    """Where a fragment's bytes are in its file."""

    dtype: torch.dtype
    start: int  # of the fragment, in elements of the parameter
    stop: int
    offset: int  # of its first byte, in the file


@dataclass(frozen=True, slots=True)
class Entry:
    """A fragment in the making: its values come in pieces, in order, when they are written."""

    parameter: str
    state: str
    start: int
    stop: int
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]

    @classmethod
    def of(cls, fragment: Fragment) -> "Entry":
        """What is in memory, copied from its device a piece at a time."""
        values = fragment.values.detach()
        return cls(
            fragment.parameter,
            fragment.state,
            fragment.start,
            fragment.stop,
            values.dtype,
            lambda: torch.split(values, _COPY_NUMEL),
        )


def write_rank_file(path: str, entries: Sequence[Entry], *, durable: bool = True) -> ChecksumWriter:
    """Write a rank's fragments; returns what knows the file's size and checksum.

    `durable` waits until the disk has them.
    """
    header: dict[str, object] = {"__metadata__": {"format": "distft-fragments"}}
    offset = 0
    for entry in entries:
        num_bytes = (entry.stop - entry.start) * entry.dtype.itemsize
        header[f"{entry.parameter}/{entry.state}/{entry.start}"] = {
            "dtype": _CODES[entry.dtype],
            "shape": [entry.stop - entry.start],
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to 8 bytes
    with open_write(path, durable=durable) as file:
        writer = ChecksumWriter(file)
        writer.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for entry in entries:
            for piece in entry.pieces():
                writer.write(_bytes_of(piece))
    return writer


def _bytes_of(values: Tensor) -> memoryview:
    flat: Any = values.cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(flat)


def read_header(path: str) -> dict[tuple[str, str], Place]:
    """Where each (parameter, state) of a rank's file lies; `CheckpointError` for what is no such file."""
    try:
        length = int.from_bytes(read_range(path, 0, _LENGTH_BYTES), "little")
        if not 0 < length <= _MAX_HEADER_BYTES:
            raise ValueError(f"its header would be {length} bytes long")
        raw: Mapping[str, Mapping[str, Any]] = json.loads(
            bytes(read_range(path, _LENGTH_BYTES, _LENGTH_BYTES + length))
        )
        return dict(_places(raw, _LENGTH_BYTES + length))
    except UnreachableError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; use another checkpoint.") from None
    except (ValueError, KeyError, TypeError, AttributeError, StorageError) as error:
        raise CheckpointError(
            f"{path} is not a rank's file ({error}): damaged; use another checkpoint."
        ) from None


def _places(raw: Mapping[str, Mapping[str, Any]], data_offset: int) -> list[tuple[tuple[str, str], Place]]:
    places = []
    for key, entry in raw.items():
        if key == "__metadata__":
            continue
        parameter, state, start = key.rsplit("/", 2)
        begin, end = entry["data_offsets"]
        dtype = _DTYPES[str(entry["dtype"])]
        numel = (end - begin) // dtype.itemsize
        places.append(((parameter, state), Place(dtype, int(start), int(start) + numel, data_offset + begin)))
    return places


def read_values(path: str, place: Place, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the parameter from a file that has them at `place`; reads no other bytes."""
    begin = place.offset + (start - place.start) * place.dtype.itemsize
    return read_elements(path, begin, place.dtype, stop - start)


def read_elements(path: str, offset: int, dtype: torch.dtype, numel: int) -> Tensor:
    """`numel` elements that lie at byte `offset` of a file: 1-D, in memory of their own."""
    values = torch.empty(numel, dtype=dtype)
    if numel:
        raw: Any = values.view(torch.uint8).numpy()
        read_into(path, offset, memoryview(raw))
    return values
