"""Files of whole tensors in the safetensors format: their headers, read and written by ourselves."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from distft import storage
from distft.errors import CheckpointError, StorageError, UnreachableError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor's bytes are."""

    path: str
    code: str  # the format's name of the dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte, in the file
    stop: int  # behind its last byte

    @property
    def dtype(self) -> torch.dtype | None:
        """None where it is none that weights are kept in."""
        return _DTYPES.get(self.code)


def read_header(path: str) -> dict[str, TensorPlace]:
    """Each tensor's place. Raises `CheckpointError` for what is missing or no such file.

    Whether the file is as long as its header says is not looked at.
    """
    try:
        length = int.from_bytes(storage.read_range(path, 0, _LENGTH_BYTES), "little")
        if not 0 < length <= _MAX_HEADER_BYTES:
            raise ValueError(f"its header would be {length} bytes long")
        raw = json.loads(storage.read_range(path, _LENGTH_BYTES, _LENGTH_BYTES + length))
        return {
            name: _place(path, _LENGTH_BYTES + length, entry)
            for name, entry in raw.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except UnreachableError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, StorageError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}): fetch it again.") from None


def _place(path: str, data_offset: int, entry: Mapping[str, Any]) -> TensorPlace:
    start, stop = entry["data_offsets"]
    place = TensorPlace(
        path, str(entry["dtype"]), tuple(entry["shape"]), data_offset + start, data_offset + stop
    )
    if place.dtype is not None and prod(place.shape) * place.dtype.itemsize != stop - start:
        raise ValueError(f"{list(place.shape)} of {place.code} in {stop - start} bytes")
    return place


def header_bytes(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The head of a file that these tensors follow without gaps: name, dtype, shape of each.

    Readers want elements aligned: give tensors of larger elements first.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers reads files of torch only
    offset = 0
    for name, dtype, shape in tensors:
        num_bytes = prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for data aligned to 8 bytes
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
