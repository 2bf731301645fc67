"""Pickles plain values as torch.save does: tensors by reference to a storage, some classes by name only."""

import argparse
import io
import pickle
import types
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2, _rebuild_tensor_v3

from distft.checkpoint.formats.torch_file.values import NumpyArray, OpaqueObject, StoredTensor, StreamedTensor

WritableTensor = Tensor | StoredTensor | StreamedTensor

_STORAGES: Mapping[torch.dtype, Any] = MappingProxyType(
    {
        torch.float64: torch.DoubleStorage,
        torch.float32: torch.FloatStorage,
        torch.float16: torch.HalfStorage,
        torch.bfloat16: torch.BFloat16Storage,
        torch.int64: torch.LongStorage,
        torch.int32: torch.IntStorage,
        torch.int16: torch.ShortStorage,
        torch.int8: torch.CharStorage,
        torch.uint8: torch.ByteStorage,
        torch.bool: torch.BoolStorage,
        torch.complex128: torch.ComplexDoubleStorage,
        torch.complex64: torch.ComplexFloatStorage,
    }
)
# torch stores tensors of these as plain bytes.
_UNTYPED = frozenset(
    getattr(torch, name)
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
)
_UNTYPED |= frozenset([torch.float8_e4m3fnuz, torch.float8_e5m2fnuz])
_TENSORS = (Tensor, StoredTensor, StreamedTensor)
_SCALARS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
_CALLABLE = (type, types.FunctionType, types.BuiltinFunctionType)  # that the values above are made with
_CONTAINERS = (Mapping, list, tuple, set)
_PROTOCOL = 2  # torch.save's


def can_pickle(value: object) -> bool:
    """Whether `dump_pickle` accepts `value`."""
    if isinstance(value, Mapping):
        return all(can_pickle(key) and can_pickle(entry) for key, entry in value.items())
    if isinstance(value, list | tuple | set):
        return all(can_pickle(entry) for entry in value)
    if isinstance(value, argparse.Namespace):
        return can_pickle(vars(value))
    if isinstance(value, _TENSORS):
        return value.dtype in _STORAGES or value.dtype in _UNTYPED
    return isinstance(value, (*_SCALARS, NumpyArray))


def dump_pickle(value: Any) -> tuple[bytes, list[WritableTensor]]:
    """The pickle of `value`, and the tensors to write as storages 0, 1 and so on.

    Raises `TypeError` for values that are neither plain data nor tensors.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=_PROTOCOL)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


@dataclass(frozen=True, slots=True)
class _Reference:
    """A storage of the file."""

    key: int
    dtype: torch.dtype
    numel: int


# The pickler in Python: that in C names no class that it cannot import.
_PythonPickler: Any = pickle._Pickler


class _Pickler(_PythonPickler):  # type: ignore[misc]
    """Collects the tensors; one that occurs twice is stored once."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol=protocol)
        self.tensors: list[WritableTensor] = []
        self._references: dict[int, _Reference] = {}  # by id of the tensor

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Reference):
            return None
        if obj.dtype in _UNTYPED:
            return ("storage", torch.UntypedStorage, str(obj.key), "cpu", obj.numel * obj.dtype.itemsize)
        return ("storage", _STORAGES[obj.dtype], str(obj.key), "cpu", obj.numel)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _TENSORS):
            return self._reduce_tensor(obj)
        if isinstance(obj, NumpyArray):
            return obj.values.__reduce__()
        if isinstance(obj, (*_SCALARS, *_CONTAINERS, argparse.Namespace, np.dtype, _Reference, *_CALLABLE)):
            return NotImplemented
        raise TypeError(
            f"{type(obj).__module__}.{type(obj).__qualname__} is not plain data, which a torch file needs"
        )

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if not isinstance(obj, OpaqueObject) or id(obj) in self.memo:
            super().save(obj, save_persistent_id)
            return
        name = f"{obj.module}\n{obj.name}\n".encode()
        self.write(pickle.GLOBAL + name + pickle.EMPTY_TUPLE + pickle.NEWOBJ)
        self.memoize(obj)
        self.save(dict(obj.fields))
        self.write(pickle.BUILD)

    def _reduce_tensor(self, tensor: WritableTensor) -> tuple[Any, ...]:
        if not can_pickle(tensor):
            raise TypeError(f"distft cannot write a tensor of {tensor.dtype} to a torch file")
        shape = tuple(tensor.shape)
        if id(tensor) not in self._references:
            self._references[id(tensor)] = _Reference(len(self.tensors), tensor.dtype, prod(shape))
            self.tensors.append(tensor)
        stride = tuple(prod(shape[index + 1 :]) for index in range(len(shape)))
        reference = self._references[id(tensor)]
        arguments: tuple[Any, ...] = (reference, 0, shape, stride, False, OrderedDict())
        if tensor.dtype in _UNTYPED:
            return _rebuild_tensor_v3, (*arguments, tensor.dtype)
        return _rebuild_tensor_v2, arguments
