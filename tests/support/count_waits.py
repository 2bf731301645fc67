"""Counts what would make the host wait for a GPU, on a machine that has none."""

from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that hand values to Python, or whose result has a size that depends on values.
WAITS = {
    "aten._local_scalar_dense",
    "aten.equal",
    "aten.is_nonzero",
    "aten.item",
    "aten.masked_select",
    "aten.nonzero",
    "aten._unique2",
}
WAITING_METHODS = {Tensor.cpu, Tensor.item, Tensor.numpy, Tensor.tolist}
# With a device they copy numbers of Python to it, from memory that is not pinned.
CONSTRUCTORS = {torch.as_tensor, torch.asarray, torch.tensor, Tensor.new_tensor}


class CountWaits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: in this thread, and in its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._functions = _Functions(self.found)

    def __enter__(self) -> Self:
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket)
        # Indexing with a mask first counts its elements.
        indices = args[1] if name in {"aten.index", "aten.index_put", "aten.index_put_"} else ()
        is_masked = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in WAITS or is_masked:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Sees calls that the dispatcher does not."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WAITING_METHODS or (func in CONSTRUCTORS and kwargs.get("device") is not None):
            self._found.append(func.__name__)
        return func(*args, **kwargs)
