"""Headers of safetensors files, of distft's rank files and of transformers' weights: read and written.

The header is JSON before the tensors' bytes: 8 bytes with its length, then dtype, shape and place by name.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Annotated

import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from distft import storage
from distft.errors import CheckpointError, StorageError, UnreachableError

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "C64": torch.complex64,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_SMALL_HEADER_BYTES = 1 << 20  # read without a request for the file's size

_Count = Annotated[int, Field(ge=0, lt=1 << 63, strict=True)]


class AbsentFileError(CheckpointError):
    """A file is missing, or a git-LFS pointer is in its place."""


class _Entry(BaseModel):
    """One tensor in the header."""

    dtype: str
    shape: Annotated[tuple[_Count, ...], Field(max_length=64)]
    data_offsets: tuple[_Count, _Count]


_HEADER: TypeAdapter[dict[str, _Entry | dict[str, str]]] = TypeAdapter(dict[str, _Entry | dict[str, str]])


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
        """None if torch has no such dtype."""
        return DTYPES.get(self.dtype_code)


def read_safetensors_header(path: str) -> dict[str, TensorLocation]:
    """The location of each tensor. The file may be shorter than that: compare `stop` with its size.

    Raises `CheckpointError` if the file is missing or not a safetensors file.
    """
    try:
        length = int.from_bytes(storage.read_range(path, 0, _LENGTH_BYTES), "little")
        if not 0 < length <= _MAX_HEADER_BYTES or (
            length > _SMALL_HEADER_BYTES and length > storage.size(path) - _LENGTH_BYTES
        ):
            storage.check_not_lfs_pointer(path, error=AbsentFileError)
            raise ValueError(f"its header claims to be {length:,} bytes long")
        text = storage.read_range(path, _LENGTH_BYTES, _LENGTH_BYTES + length)
        return _locate(path, _LENGTH_BYTES + length, text)
    except (FileNotFoundError, IsADirectoryError):
        raise AbsentFileError(f"{path} is missing; use another checkpoint, or copy it again.") from None
    except (UnreachableError, CheckpointError):
        raise
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        where = ".".join(map(str, found["loc"][:2]))
        raise _not_safetensors(path, f"{where}: {found['msg']}") from None
    except (ValueError, StorageError) as error:
        raise _not_safetensors(path, str(error)) from None


def _not_safetensors(path: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a safetensors file ({reason}): damaged; use another checkpoint, or copy it again."
    )


def _locate(path: str, data_offset: int, text: bytes) -> dict[str, TensorLocation]:
    """Raises `ValueError` for tensors that overlap, or whose size does not fit their shape."""
    located = {}
    for name, entry in _HEADER.validate_json(text).items():
        if name == _METADATA:
            continue
        if not isinstance(entry, _Entry):
            raise ValueError(f"{name!r} has no dtype, shape and data_offsets")
        start, stop = entry.data_offsets
        dtype = DTYPES.get(entry.dtype)
        if stop < start or (dtype is not None and prod(entry.shape) * dtype.itemsize != stop - start):
            raise ValueError(
                f"{stop - start:,} bytes for {name!r} of shape {list(entry.shape)} in {entry.dtype}"
            )
        located[name] = TensorLocation(
            path, entry.dtype, entry.shape, data_offset + start, data_offset + stop
        )
    position = data_offset
    for name, location in sorted(located.items(), key=lambda item: (item[1].offset, item[1].stop)):
        if location.offset < position:
            raise ValueError(f"{name!r} overlaps the tensor before it")
        position = location.stop
    return located


def safetensors_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], *, kind: str = "pt"
) -> bytes:
    """The header of a file with these tensors (name, dtype, shape), whose bytes follow without gaps.

    `kind` is the format in the metadata; transformers requires "pt". Give tensors with larger elements
    first: readers need elements aligned.
    """
    header: dict[str, object] = {_METADATA: {"format": kind}}
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
