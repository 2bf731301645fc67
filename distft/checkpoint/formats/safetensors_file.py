"""Headers of safetensors files: reads and writes them, without the safetensors library."""

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
class TensorLocation:
    """Location of one tensor's bytes."""

    path: str
    dtype_code: str  # safetensors' name of the dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte, in the file
    stop: int  # after its last byte

    @property
    def dtype(self) -> torch.dtype | None:
        """None if it is not a floating-point dtype that distft reads."""
        return _DTYPES.get(self.dtype_code)


def read_header(path: str) -> dict[str, TensorLocation]:
    """The location of each tensor. Does not check that the file is as long as its header says.

    Raises `CheckpointError` if the file is missing or not a safetensors file.
    """
    try:
        length = int.from_bytes(storage.read_range(path, 0, _LENGTH_BYTES), "little")
        if not 0 < length <= _MAX_HEADER_BYTES:
            raise ValueError(f"its header claims to be {length:,} bytes long")
        raw = json.loads(storage.read_range(path, _LENGTH_BYTES, _LENGTH_BYTES + length))
        return {
            name: _location(path, _LENGTH_BYTES + length, entry)
            for name, entry in raw.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except UnreachableError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, StorageError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}): download it again.") from None


def _location(path: str, data_offset: int, entry: Mapping[str, Any]) -> TensorLocation:
    start, stop = entry["data_offsets"]
    location = TensorLocation(
        path, str(entry["dtype"]), tuple(entry["shape"]), data_offset + start, data_offset + stop
    )
    if location.dtype is not None and prod(location.shape) * location.dtype.itemsize != stop - start:
        raise ValueError(f"{stop - start} bytes for {list(location.shape)} of {location.dtype_code}")
    return location


def header_bytes(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header of a file with these tensors (name, dtype, shape), whose bytes follow without gaps.

    Give tensors with larger elements first: readers need elements aligned.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires "pt"
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
