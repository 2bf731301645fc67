"""What stands for tensors, and for objects of foreign classes, in the files that `torch.save` writes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from distft.checkpoint.rank_file import read_elements


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that stays in its file until it is read."""

    path: str
    offset: int  # of its first element, in bytes of the file
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # in elements

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in the file one after the other, in the order of the flattened tensor."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor: 1-D, in memory of their own."""
        if self.is_contiguous or stop <= start:
            begin = self.offset + start * self.dtype.itemsize
            return read_elements(self.path, begin, self.dtype, max(stop - start, 0))
        row_numel = prod(self.shape[1:])
        first, last = start // row_numel, -(-stop // row_numel)
        shape = (last - first, *self.shape[1:])
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, self.stride, strict=True))
        begin = self.offset + first * self.stride[0] * self.dtype.itemsize
        values = read_elements(self.path, begin, self.dtype, span)
        flat = torch.as_strided(values, shape, self.stride).reshape(-1)
        return flat[start - first * row_numel : stop - first * row_numel]

    def number(self) -> float | int:
        """The value of a tensor of one element."""
        value: float | int = self.read(0, 1).item()
        return value


@dataclass(frozen=True, slots=True)
class StreamedTensor:
    """A tensor that is made while it is written. Two places that hold the same object share its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]  # 1-D and on the CPU; in sum the flattened tensor

    @property
    def numel(self) -> int:
        return prod(self.shape)


class ForeignObject:
    """An object of a class that is known by name alone: its fields, and nothing that could run."""

    module = ""
    name = ""
    fields: Mapping[str, Any] = {}

    def __init__(self, module: str, name: str, fields: Mapping[str, Any]) -> None:
        self.module, self.name, self.fields = module, name, fields

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.fields = dict(state)

    @staticmethod
    def of_class(module: str, name: str) -> "type[ForeignObject]":
        """A class whose objects a pickle can fill in place of the ones that it names."""
        return type(name, (ForeignObject,), {"module": module, "name": name})
