"""Writes the pickle inside a torch file: plain values, tensors by reference, classes by name."""

import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from distft.checkpoint.formats.torch_unpickle import STORAGE_DTYPES
from distft.checkpoint.formats.torch_values import OpaqueObject, StoredTensor, StreamedTensor

WritableTensor = Tensor | StoredTensor | StreamedTensor

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_TENSORS = (Tensor, StoredTensor, StreamedTensor)
_SCALARS = (bool, int, float, str, bytes, torch.dtype, torch.device, type(None))
# Opcodes of protocol 2, which torch.save uses and torch.load(weights_only=True) supports completely.
_PROTOCOL, _STOP = b"\x80\x02", b"."
_MARK, _TUPLE, _EMPTY_TUPLE, _ONE_TUPLE = b"(", b"t", b")", b"\x85"
_GLOBAL, _REDUCE, _NEW_OBJECT, _BUILD, _PERSISTENT = b"c", b"R", b"\x81", b"b", b"Q"
_LIST, _APPENDS, _DICT, _SET_ITEMS = b"]", b"e", b"}", b"u"
_CONSTANTS = {None: b"N", True: b"\x88", False: b"\x89"}
_INT32, _LONG, _FLOAT, _TEXT = b"J", b"\x8a", b"G", b"X"


def can_pickle(value: object) -> bool:
    """Whether `dump_pickle` accepts `value`."""
    if isinstance(value, Mapping):
        return all(can_pickle(key) and can_pickle(entry) for key, entry in value.items())
    if isinstance(value, list | tuple | set):
        return all(can_pickle(entry) for entry in value)
    if isinstance(value, _TENSORS):
        return value.dtype in _STORAGE_NAMES
    return isinstance(value, _SCALARS)


def dump_pickle(value: Any) -> tuple[bytes, list[WritableTensor]]:
    """The pickle of `value`, and the tensors to write as storages 0, 1 and so on.

    Raises `TypeError` for values that are neither plain data nor tensors.
    """
    writer = _PickleWriter()
    return b"".join([_PROTOCOL, *writer.opcodes(value), _STOP]), writer.tensors


class _PickleWriter:
    """Turns values into opcodes, and collects their tensors; one that occurs twice is stored once."""

    def __init__(self) -> None:
        self.tensors: list[WritableTensor] = []
        self._storage_numbers: dict[int, int] = {}  # id of a tensor -> number of its storage

    def opcodes(self, value: Any) -> Iterable[bytes]:
        if isinstance(value, _TENSORS):
            yield from self._tensor(value)
        elif isinstance(value, OpaqueObject):
            yield from (_global(value.module, value.name), _EMPTY_TUPLE, _NEW_OBJECT)
            yield from self.opcodes(dict(value.fields))
            yield _BUILD
        elif isinstance(value, OrderedDict):
            yield from (_global("collections", "OrderedDict"), _EMPTY_TUPLE, _REDUCE)
            yield from self._items(value)
        elif isinstance(value, Mapping):
            yield _DICT
            yield from self._items(value)
        elif isinstance(value, torch.Size):
            yield from self._call("torch", "Size", tuple(value))
        elif isinstance(value, tuple):
            yield from (_MARK, *self._sequence(value), _TUPLE)
        elif isinstance(value, list):
            yield from (_LIST, _MARK, *self._sequence(value), _APPENDS)
        elif isinstance(value, set):
            yield from self._call("__builtin__", "set", list(value))
        elif isinstance(value, torch.device):
            yield from self._call("torch", "device", str(value))
        elif isinstance(value, torch.dtype):
            yield _global("torch", str(value).removeprefix("torch."))
        elif isinstance(value, bytes):
            yield from (
                _global("_codecs", "encode"),
                *self.opcodes((value.decode("latin1"), "latin1")),
                _REDUCE,
            )
        else:
            yield _scalar(value)

    def _sequence(self, values: Iterable[Any]) -> Iterable[bytes]:
        for value in values:
            yield from self.opcodes(value)

    def _items(self, entries: Mapping[Any, Any]) -> Iterable[bytes]:
        yield _MARK
        for key, value in entries.items():
            yield from self.opcodes(key)
            yield from self.opcodes(value)
        yield _SET_ITEMS

    def _call(self, module: str, name: str, argument: Any) -> Iterable[bytes]:
        yield from (_global(module, name), *self.opcodes(argument), _ONE_TUPLE, _REDUCE)

    def _tensor(self, tensor: WritableTensor) -> Iterable[bytes]:
        if tensor.dtype not in _STORAGE_NAMES:
            raise TypeError(f"distft cannot write a tensor of {tensor.dtype} to a torch file")
        if id(tensor) not in self._storage_numbers:
            self._storage_numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        shape = tuple(tensor.shape)
        numel = 1
        stride: list[int] = []
        for size in reversed(shape):
            stride.insert(0, numel)
            numel *= size
        yield from (_global("torch._utils", "_rebuild_tensor_v2"), _MARK)
        yield from (_MARK, _scalar("storage"), _global("torch", _STORAGE_NAMES[tensor.dtype]))
        yield from (
            _scalar(str(self._storage_numbers[id(tensor)])),
            _scalar("cpu"),
            _scalar(numel),
            _TUPLE,
            _PERSISTENT,
        )
        yield from self._sequence([0, shape, tuple(stride), False, OrderedDict()])
        yield from (_TUPLE, _REDUCE)


def _global(module: str, name: str) -> bytes:
    return _GLOBAL + f"{module}\n{name}\n".encode()


def _scalar(value: Any) -> bytes:
    if value is None or isinstance(value, bool):
        return _CONSTANTS[value]
    if isinstance(value, int):
        if -(1 << 31) <= value < 1 << 31:
            return _INT32 + struct.pack("<i", value)
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return _LONG + bytes([len(data)]) + data
    if isinstance(value, float):
        return _FLOAT + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        return _TEXT + struct.pack("<I", len(data)) + data
    raise TypeError(
        f"{type(value).__module__}.{type(value).__qualname__} is not plain data, which a torch file needs"
    )
