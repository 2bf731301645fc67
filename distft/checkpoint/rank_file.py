"""One rank's fragments as a safetensors file: a JSON header and plain bytes, no code.

Keys are `parameter/state/start`; each tensor is 1-D. Any safetensors reader opens these files.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distft.checkpoint.fragments import Fragment
from distft.checkpoint.manifest import FileRecord
from distft.checkpoint.safetensors_header import read_safetensors_header, safetensors_header
from distft.errors import CheckpointError
from distft.storage import ChecksumWriter, open_write, read_into

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
        """A fragment of an engine; a chunk at a time is copied from its device."""
        return cls(
            fragment.parameter,
            fragment.state,
            fragment.start,
            fragment.stop,
            fragment.dtype,
            lambda: torch.split(fragment.values.detach(), _COPY_NUMEL),
        )


def write_rank_file(
    path: str, fragments: Sequence[LazyFragment], *, name: str, durable: bool = True
) -> FileRecord:
    """Write a rank's fragments to `path`; returns the record of the file, which the manifest calls `name`.

    `durable`: return only when the disk has the data.
    """
    tensors = [
        (f"{part.parameter}/{part.state}/{part.start}", part.dtype, (part.stop - part.start,))
        for part in fragments
    ]
    header = safetensors_header(tensors, kind="distft-fragments")
    with open_write(path, durable=durable) as file:
        writer = ChecksumWriter(file)
        writer.write(header)
        for fragment in fragments:
            for chunk in fragment.chunks():
                writer.write(bytes_of(chunk))
    return FileRecord(
        name=name,
        num_bytes=writer.num_bytes,
        checksum=writer.checksum,
        intervals={fragment.parameter: (fragment.start, fragment.stop) for fragment in fragments},
    )


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a tensor's elements in order; without a copy if it is contiguous and on the CPU."""
    flat: Any = values.cpu().contiguous().view(torch.uint8).numpy()
    return memoryview(flat)


def read_header(path: str) -> dict[tuple[str, str], FragmentLocation]:
    """Location of each (parameter, state) in a rank's file.

    Raises `CheckpointError` if the file is missing or damaged.
    """
    found = {}
    for key, tensor in read_safetensors_header(path).items():
        parameter, state, start = [*key.rsplit("/", 2), "", ""][:3]
        if tensor.dtype is None or len(tensor.shape) != 1 or not start.isdecimal():
            raise CheckpointError(
                f"{path} has the tensor {key!r} {list(tensor.shape)} of {tensor.dtype_code}, which is not a "
                "fragment: it is not a rank's file, or damaged. Use another checkpoint."
            )
        stop = int(start) + tensor.shape[0]
        found[parameter, state] = FragmentLocation(tensor.dtype, int(start), stop, tensor.offset)
    return found


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
