"""Reads a torch file with torch's restricted unpickler; its tensors become `StoredTensor`."""

import argparse
import io
import pickle
import threading
import types
import zipfile
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch

from distft.checkpoint.formats.torch_file.archive import (
    LOCAL_HEADER,
    PICKLE,
    StorageRecord,
    TorchArchive,
    read_archive,
)
from distft.checkpoint.formats.torch_file.scan import PREFIX, scan_pickle
from distft.checkpoint.formats.torch_file.values import NumpyArray, OpaqueObject, StoredTensor
from distft.errors import CheckpointError, UnsupportedFormatError

_LOCK = threading.Lock()  # torch has one set of safe globals for all threads
_OPAQUE = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)
_TYPES = ("bool", "dict", "float", "int", "list", "str", "tuple")  # as the factory of a defaultdict


def read_torch_file(path: str, *, trust: bool = False) -> Any:
    """The value in a torch file, with tensors as `StoredTensor`. No code from the file runs.

    Raises `CheckpointError` for a file that is missing or damaged, and for one that torch.save cannot have
    written; `UnsupportedFormatError` for one in torch's old format, or with classes that distft does not
    read. `trust` imports these classes instead, which can run code.
    """
    archive = read_archive(path)
    records: dict[int, StorageRecord] = {}
    functions = _Functions(archive, records).by_name()
    data = archive.pickle if trust else scan_pickle(archive.pickle, functions, path)
    file = _with_empty_storages(data, archive, records)
    try:
        if trust:
            module = types.SimpleNamespace(
                __name__="pickle",
                load=pickle.load,
                Unpickler=type("Unpickler", (_TrustingUnpickler,), {"functions": functions}),
            )
            return torch.load(file, map_location="meta", weights_only=False, pickle_module=module)
        safe: list[Any] = [(value, f"{PREFIX}.{name}") for name, value in functions.items()]
        with _LOCK, torch.serialization.safe_globals(safe):
            # On the meta device a storage has no memory, and tells its offset in the file.
            return torch.load(file, map_location="meta", weights_only=True)
    except UnsupportedFormatError as error:
        raise UnsupportedFormatError(f"{path}: {error}") from None
    except Exception as error:  # a damaged or hostile pickle can raise anything
        # Torch's own message advises to load the file with weights_only=False.
        is_refused = isinstance(error, pickle.UnpicklingError)
        reason = "an operation that torch refuses" if is_refused else str(error)
        raise CheckpointError(
            f"{path} is damaged: torch.save does not write such a pickle ({type(error).__name__}: {reason}). "
            "Use another checkpoint."
        ) from error


def _with_empty_storages(
    pickle_data: bytes, archive: TorchArchive, records: dict[int, StorageRecord]
) -> io.BytesIO:
    """A torch file with empty storages: all that torch gets to see of a stranger's archive.

    Adds to `records` the true record of each storage, by its offset in this file.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr(f"archive/{PICKLE}", pickle_data)
        target.writestr("archive/byteorder", b"little")
        target.writestr("archive/version", b"3\n")
        for key, record in archive.records.items():
            name = f"archive/data/{key}"
            target.writestr(name, b"")
            records[target.getinfo(name).header_offset + LOCAL_HEADER.size + len(name)] = record
    file.seek(0)
    return file


class _TrustingUnpickler(pickle.Unpickler):
    functions: Mapping[str, Any]

    def find_class(self, module: str, name: str, /) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        return self.functions[full] if full in self.functions else super().find_class(module, name)


class _Functions:
    """What pickles of torch.save call, in place of the functions themselves; each checks its arguments."""

    def __init__(self, archive: TorchArchive, records: Mapping[int, StorageRecord]) -> None:
        """`records` has the storages by the offset that torch gives them."""
        self._archive, self._records = archive, records

    def by_name(self) -> dict[str, Any]:
        return {
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.tensor_of_dtype,
            "torch._utils._rebuild_parameter": _parameter,
            "torch._utils._rebuild_parameter_with_state": _parameter,
            "torch._tensor._rebuild_from_type_v2": self.subclass,
            "torch.Tensor": "torch.Tensor",
            "torch.nn.parameter.Parameter": "torch.nn.Parameter",
            "torch.storage.UntypedStorage": _BytesStorage,
            "torch.Size": _size,
            "torch.device": _device,
            "collections.defaultdict": _default_dict,
            "_codecs.encode": _encoded,
            "builtins.bytes": _encoded,
            "builtins.bytearray": _byte_array,
            "builtins.complex": _complex,
            "builtins.set": _set,
            "builtins.frozenset": _frozen_set,
            **{f"builtins.{name}": name for name in _TYPES},
            "numpy.dtype": _NumpyDtype,
            "numpy.ndarray": "numpy.ndarray",
            **dict.fromkeys(("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _numpy_scalar),
            **{f"numpy.{core}.multiarray._reconstruct": NumpyArray for core in ("core", "_core")},
            "argparse.Namespace": argparse.Namespace,
            "deepspeed.runtime.zero.config.ZeroStageEnum": _integer,
            **{name: OpaqueObject.stand_in(*name.rsplit(".", 1)) for name in _OPAQUE},
        }

    def tensor(
        self,
        storage: Any,
        start: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        _requires_grad: bool = False,
        _hooks: object = None,
        metadata: Mapping[str, bool] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> StoredTensor:
        if not isinstance(storage, torch.storage.TypedStorage):
            raise TypeError("a tensor without a storage")
        record = self._records[storage._untyped_storage._checkpoint_offset or -1]
        dtype = dtype or storage.dtype
        shape, stride = tuple(shape), tuple(stride)
        if len(shape) != len(stride) or any(_integer(number) < 0 for number in (start, *shape, *stride)):
            raise ValueError("a tensor of negative sizes")
        if metadata and any(metadata.values()):
            raise UnsupportedFormatError(
                "a tensor that is stored as the conjugate or negative of another is not read: save it after "
                "resolve_conj() and resolve_neg()."
            )
        numel = prod(shape)
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if numel else 0
        if numel and (start + extent) * dtype.itemsize > record.num_bytes:
            raise ValueError(
                f"a tensor of {start + extent} elements in a storage of {record.num_bytes} bytes"
            )
        if numel * dtype.itemsize > self._archive.num_bytes:
            raise ValueError(f"a tensor that repeats {extent} elements {numel // extent} times")
        return StoredTensor(self._archive.path, record.offset + start * dtype.itemsize, dtype, shape, stride)

    def tensor_of_dtype(self, *arguments: Any) -> StoredTensor:
        return self.tensor(*arguments[:6], *arguments[7:8], dtype=arguments[6])

    def subclass(self, function: Any, _kind: object, arguments: tuple[Any, ...], _state: object) -> Any:
        if function not in (self.tensor, self.tensor_of_dtype):
            raise ValueError("a tensor that no function of torch builds")
        return function(*arguments)


class _BytesStorage:
    dtype = torch.uint8


def _parameter(data: StoredTensor, *_: object) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise TypeError("a parameter that is not a tensor")
    return data


def _integer(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError("a number that is not an integer")
    return int(value)


def _size(sizes: tuple[int, ...]) -> torch.Size:
    return torch.Size([_integer(size) for size in sizes])


def _device(name: str, *index: int) -> torch.device:
    return torch.device(name, *index)


def _default_dict(*_: object) -> dict[Any, Any]:
    return {}


def _encoded(text: str = "", encoding: str = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in {"latin1", "latin-1"}:
        raise ValueError("bytes in another encoding than latin1, as pickles have them")
    return text.encode("latin1")


def _byte_array(data: bytes | str = b"", encoding: str = "latin1") -> bytearray:
    return bytearray(data if isinstance(data, bytes) else _encoded(data, encoding))


def _complex(real: float, imaginary: float) -> complex:
    return complex(real, imaginary)


def _set(items: list[Any] | tuple[()] = ()) -> set[Any]:
    if any(isinstance(item, tuple) for item in items):  # hashing goes through all of a tuple
        raise ValueError("a set of tuples")
    return set(items)


def _frozen_set(items: list[Any] | tuple[()] = ()) -> frozenset[Any]:
    return frozenset(_set(items))


class _NumpyDtype:
    """In place of `numpy.dtype`, which accepts descriptions that make numpy take numbers for pointers."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biufc":
            raise UnsupportedFormatError(f"numpy's type {code!r} is not read: only numbers are.")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder("<" if state[1] == "|" else state[1])


def _numpy_scalar(kind: _NumpyDtype, data: bytes) -> object:
    return np.frombuffer(data, dtype=kind.dtype, count=1)[0].item()
