"""The pickle inside a torch file, written by hand: plain values, tensors by reference, classes by name."""

import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from distft.checkpoint.formats.torch_unpickle import STORAGE_DTYPES
from distft.checkpoint.formats.torch_values import ForeignObject, StoredTensor, StreamedTensor

AnyTensor = Tensor | StoredTensor | StreamedTensor

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_TENSORS = (Tensor, StoredTensor, StreamedTensor)
_SCALARS = (bool, int, float, str, bytes, torch.dtype, torch.device, type(None))
# Opcodes of protocol 2, the one that torch.save uses and that weights_only=True understands whole.
_PROTOCOL, _STOP = b"\x80\x02", b"."
_MARK, _TUPLE, _EMPTY_TUPLE, _ONE_TUPLE = b"(", b"t", b")", b"\x85"
_GLOBAL, _REDUCE, _NEW_OBJECT, _BUILD, _PERSISTENT = b"c", b"R", b"\x81", b"b", b"Q"
_LIST, _APPENDS, _DICT, _SET_ITEMS = b"]", b"e", b"}", b"u"
_CONSTANTS = {None: b"N", True: b"\x88", False: b"\x89"}
_INT32, _LONG, _FLOAT, _TEXT = b"J", b"\x8a", b"G", b"X"


def is_plain(value: object) -> bool:
    """Whether `pickled` can write `value`."""
    if isinstance(value, Mapping):
        return all(is_plain(key) and is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple | set):
        return all(is_plain(entry) for entry in value)
    if isinstance(value, _TENSORS):
        return value.dtype in _STORAGE_NAMES
    return isinstance(value, _SCALARS)


def pickled(value: Any) -> tuple[bytes, list[AnyTensor]]:
    """The pickle of `value`, and the tensors whose elements are its storages 0, 1 and so on.

    Raises `TypeError` for what is neither plain data nor a tensor.
    """
    emitter = _Emitter()
    return b"".join([_PROTOCOL, *emitter.emit(value), _STOP]), emitter.tensors


class _Emitter:
    def __init__(self) -> None:
        self.tensors: list[AnyTensor] = []
        self._keys: dict[int, int] = {}  # id of a tensor -> its number

    def emit(self, value: Any) -> Iterable[bytes]:
        if isinstance(value, _TENSORS):
            yield from self._tensor(value)
        elif isinstance(value, ForeignObject):
            yield from (_global(value.module, value.name), _EMPTY_TUPLE, _NEW_OBJECT)
            yield from self.emit(dict(value.fields))
            yield _BUILD
        elif isinstance(value, OrderedDict):
            yield from (_global("collections", "OrderedDict"), _EMPTY_TUPLE, _REDUCE)
            yield from self._entries(value)
        elif isinstance(value, Mapping):
            yield _DICT
            yield from self._entries(value)
        elif isinstance(value, torch.Size):
            yield from self._call("torch", "Size", tuple(value))
        elif isinstance(value, tuple):
            yield from (_MARK, *self._all(value), _TUPLE)
        elif isinstance(value, list):
            yield from (_LIST, _MARK, *self._all(value), _APPENDS)
        elif isinstance(value, set):
            yield from self._call("__builtin__", "set", list(value))
        elif isinstance(value, torch.device):
            yield from self._call("torch", "device", str(value))
        elif isinstance(value, torch.dtype):
            yield _global("torch", str(value).removeprefix("torch."))
        elif isinstance(value, bytes):
            yield from (_global("_codecs", "encode"), *self.emit((value.decode("latin1"), "latin1")), _REDUCE)
        else:
            yield _scalar(value)

    def _all(self, values: Iterable[Any]) -> Iterable[bytes]:
        for value in values:
            yield from self.emit(value)

    def _entries(self, entries: Mapping[Any, Any]) -> Iterable[bytes]:
        yield _MARK
        for key, value in entries.items():
            yield from self.emit(key)
            yield from self.emit(value)
        yield _SET_ITEMS

    def _call(self, module: str, name: str, argument: Any) -> Iterable[bytes]:
        yield from (_global(module, name), *self.emit(argument), _ONE_TUPLE, _REDUCE)

    def _tensor(self, tensor: AnyTensor) -> Iterable[bytes]:
        if tensor.dtype not in _STORAGE_NAMES:
            raise TypeError(f"a tensor of {tensor.dtype} cannot be written to a torch file here")
        if id(tensor) not in self._keys:
            self._keys[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        shape = tuple(tensor.shape)
        numel = 1
        stride: list[int] = []
        for size in reversed(shape):
            stride.insert(0, numel)
            numel *= size
        yield from (_global("torch._utils", "_rebuild_tensor_v2"), _MARK)
        yield from (_MARK, _scalar("storage"), _global("torch", _STORAGE_NAMES[tensor.dtype]))
        yield from (_scalar(str(self._keys[id(tensor)])), _scalar("cpu"), _scalar(numel), _TUPLE, _PERSISTENT)
        yield from self._all([0, shape, tuple(stride), False, OrderedDict()])
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
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} is no plain data for a torch file")
