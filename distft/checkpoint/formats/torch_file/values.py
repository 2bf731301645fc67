"""Stand-ins for tensors that are not in memory, and for objects of classes that are not imported."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distft.checkpoint.rank_file import read_elements


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a torch file; `read` loads elements of it."""

    path: str
    offset: int  # of its first element in the file, in bytes
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie end to end in the file, in the order of the flattened tensor."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor: 1-D, in newly allocated memory."""
        if self.is_contiguous or stop <= start:
            begin = self.offset + start * self.dtype.itemsize
            return read_elements(self.path, begin, self.dtype, max(stop - start, 0))
        row_numel = prod(self.shape[1:])
        first, last = start // row_numel, -(-stop // row_numel)
        shape = (last - first, *self.shape[1:])
        extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, self.stride, strict=True))
        begin = self.offset + first * self.stride[0] * self.dtype.itemsize
        values = read_elements(self.path, begin, self.dtype, extent)
        flat = torch.as_strided(values, shape, self.stride).reshape(-1)
        return flat[start - first * row_numel : stop - first * row_numel]

    def item(self) -> float | int:
        """The value of a tensor of one element."""
        value: float | int = self.read(0, 1).item()
        return value


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """A tensor whose elements are computed while it is written; tied names that share it share its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]  # 1-D, on the CPU; end to end they are the flattened tensor

    @property
    def numel(self) -> int:
        return prod(self.shape)


class OpaqueObject:
    """An object of a class that is not imported: the class's name and the object's fields."""

    module = ""
    name = ""
    fields: Mapping[str, Any] = {}

    def __init__(self, module: str, name: str, fields: Mapping[str, Any]) -> None:
        self.module, self.name, self.fields = module, name, fields

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fields = dict(state)

    @staticmethod
    def stand_in(module: str, name: str) -> "type[OpaqueObject]":
        """A class that an unpickler uses in place of `module.name`."""
        return type(name, (OpaqueObject,), {"module": module, "name": name})


class NumpyArray:
    """A numpy array in a torch file; of numbers only."""

    def __init__(self, *_: object) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Takes what numpy's own arrays pickle: version, shape, dtype, order and bytes."""
        _, shape, kind, is_fortran, data = state
        order: Any = "F" if is_fortran else "C"
        values = np.frombuffer(data, dtype=kind.dtype).reshape(shape, order=order)
        self.values = values.astype(kind.dtype.newbyteorder("="), copy=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NumpyArray) and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return id(self)
