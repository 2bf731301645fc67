"""Reads the pickle inside a torch file without running code from it.

A pickle names classes and functions, which an ordinary unpickler imports and calls. This one replaces the
names that torch and DeepSpeed write with functions that only build records, and rejects all others.
"""

import collections
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from distft.checkpoint.formats.torch_values import OpaqueObject, StoredTensor
from distft.errors import CheckpointError, UnsupportedFormatError

STORAGE_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "DoubleStorage": torch.float64,
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "BFloat16Storage": torch.bfloat16,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
        "ShortStorage": torch.int16,
        "CharStorage": torch.int8,
        "ByteStorage": torch.uint8,
        "BoolStorage": torch.bool,
    }
)
_DEEPSPEED_CLASSES = frozenset(
    [
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ]
)


@dataclass(frozen=True, slots=True)
class StorageEntry:
    """Location of one storage's bytes in the file."""

    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: torch.dtype
    entry: StorageEntry


class _RebuildFunctions:
    """Replacements for torch's rebuild functions: the same arguments, but they only build `StoredTensor`s.

    Each file gets methods of a new object, so that a pickle that modifies them does not affect other files.
    """

    __slots__ = ("_path",)

    def __init__(self, path: str) -> None:
        self._path = path

    def tensor(
        self,
        storage: _Storage,
        start: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        *_: object,
        dtype: torch.dtype | None = None,
    ) -> StoredTensor:
        dtype = dtype or storage.dtype
        shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
        if start < 0 or len(shape) != len(stride) or any(n < 0 for n in (*shape, *stride)):
            raise ValueError(f"a tensor of shape {shape} and stride {stride} from element {start}")
        extent = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if (start + extent) * dtype.itemsize > storage.entry.num_bytes and extent:
            raise ValueError(
                f"a tensor of {start + extent} elements in a storage of {storage.entry.num_bytes} bytes"
            )
        return StoredTensor(self._path, storage.entry.offset + start * dtype.itemsize, dtype, shape, stride)

    def tensor_of_dtype(self, *arguments: Any) -> StoredTensor:
        return self.tensor(*arguments[:4], dtype=arguments[6])

    def parameter(self, data: StoredTensor, *_: object) -> StoredTensor:
        return data

    def subclass(self, function: Any, _kind: object, arguments: tuple[Any, ...], _state: object) -> Any:
        return function(*arguments)

    def numpy_dtype(self, code: str, *_: object) -> "_NumpyDtype":
        return _NumpyDtype(code)

    def numpy_scalar(self, kind: "_NumpyDtype", data: bytes) -> object:
        return np.frombuffer(data, dtype=kind.dtype, count=1)[0].item()

    def encoded(self, text: str, encoding: str = "latin1") -> bytes:
        if encoding != "latin1":  # as protocol 2 writes bytes; other codecs do more than encode
            raise ValueError(f"bytes in the encoding {encoding!r}")
        return text.encode(encoding)


class _NumpyDtype:
    __slots__ = ("dtype",)

    def __init__(self, code: str) -> None:
        dtype = np.dtype(str(code))
        if dtype.kind not in "biuf":
            raise ValueError(f"a numpy scalar of type {code!r}")
        self.dtype = dtype

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder("<" if state[1] == "|" else state[1])


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, path: str, entries: Mapping[str, StorageEntry], *, trust: bool) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path
        self._entries = entries
        self._trust = trust
        self._allowed = _allowed_globals(path)

    def find_class(self, module: str, name: str, /) -> Any:
        where = "builtins" if module == "__builtin__" else module
        if (where, name) in self._allowed:
            return self._allowed[where, name]
        if where == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if self._trust:
            return super().find_class(module, name)
        raise UnsupportedFormatError(
            f"{self._path} names {module}.{name}, which is not among the classes that DeepSpeed checkpoints "
            "need: loading it would run code. Nothing was run. If you trust the file's author, use --trust."
        )

    def persistent_load(self, pid: Any, /) -> _Storage:
        kind, dtype, key, _, numel = pid
        entry = self._entries[str(key)]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError(f"a reference to {pid!r}")
        if int(numel) * dtype.itemsize > entry.num_bytes:
            raise ValueError(f"{numel} elements of {dtype} in {entry.num_bytes} bytes of storage {key}")
        return _Storage(dtype, entry)


def _allowed_globals(path: str) -> dict[tuple[str, str], Any]:
    rebuild = _RebuildFunctions(path)
    allowed: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): rebuild.tensor,
        ("torch._utils", "_rebuild_tensor_v3"): rebuild.tensor_of_dtype,
        ("torch._utils", "_rebuild_parameter"): rebuild.parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): rebuild.parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): rebuild.subclass,
        ("torch", "Tensor"): "torch.Tensor",
        ("torch.nn.parameter", "Parameter"): "torch.nn.Parameter",
        ("torch", "Size"): torch.Size,
        ("torch", "device"): torch.device,
        ("torch.storage", "UntypedStorage"): torch.uint8,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("collections", "defaultdict"): collections.defaultdict,
        ("numpy", "dtype"): rebuild.numpy_dtype,
        ("numpy.core.multiarray", "scalar"): rebuild.numpy_scalar,
        ("numpy._core.multiarray", "scalar"): rebuild.numpy_scalar,
        ("_codecs", "encode"): rebuild.encoded,
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"): int,
    }
    allowed |= {("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()}
    allowed |= {key: OpaqueObject.stand_in(*key) for key in _DEEPSPEED_CLASSES}
    plain = (set, frozenset, list, dict, tuple, int, float, bool, str, complex, bytearray, slice)
    return allowed | {("builtins", kind.__name__): kind for kind in plain}


def load_pickle(data: bytes, path: str, entries: Mapping[str, StorageEntry], *, trust: bool) -> Any:
    """The value of the pickle `data` in the torch file `path`, with tensors as `StoredTensor`.

    Raises `UnsupportedFormatError` for a global that is not allowed, unless `trust` imports it, and
    `CheckpointError` for bytes that torch.save cannot have written.
    """
    try:
        return _Unpickler(data, path, entries, trust=trust).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise CheckpointError(
            f"{path} is damaged: torch.save does not write such a pickle ({type(error).__name__}: {error}). "
            "Use another checkpoint."
        ) from error
