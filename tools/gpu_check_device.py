"""The device that `gpu_check.py` measures: a CUDA GPU, or in its dry run a CPU that stands in for one."""

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distft.train.throughput import peak_memory_bytes

Step = Callable[[], object]

# Operations that hand a tensor's value to Python; on a GPU each waits for the device.
_READS = {"aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.nonzero.default"}
_WAIT_WARNING = "called a synchronizing CUDA operation"  # of torch's sync debug mode
_MAX_LEAK = 0.01  # of the device's memory; with more, the next case starts in a new process


@dataclass(frozen=True, slots=True)
class Device:
    """Everything that differs between the two kinds of device."""

    torch_device: torch.device

    @classmethod
    def choose(cls, *, dry: bool) -> "Device":
        """The first GPU; a CPU in a dry run."""
        return cls(torch.device("cpu") if dry else torch.device("cuda", 0))

    @property
    def kind(self) -> str:
        return self.torch_device.type

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)

    def memory_bytes(self) -> int:
        """All memory of the GPU, or of the host for a CPU."""
        if self.is_cuda:
            return torch.cuda.get_device_properties(self.torch_device).total_memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def reset_peak_memory(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.torch_device)

    def free_memory(self) -> None:
        """Return what no tensor uses; compiled graphs go too."""
        torch.compiler.reset()
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def seconds_per_step(self, step: Step, *, turns: int, steps: int) -> float:
        """The mean of the best of `turns` turns of `steps` steps each."""
        best_s = float("inf")
        for _ in range(turns):
            self.synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                step()
            self.synchronize()
            best_s = min(best_s, (time.perf_counter() - started) / steps)
        return best_s

    def needs_new_process(self) -> str | None:
        """After a case: why this process should run no other; None if it may."""
        if not self.is_cuda:
            return None
        try:
            self.synchronize()
        except RuntimeError as error:  # after an illegal access, every later call fails
            return f"the device is unusable: {error}"
        self.free_memory()
        left = torch.cuda.memory_allocated(self.torch_device)
        return f"{left / 2**20:.0f} MiB were not freed" if left > _MAX_LEAK * self.memory_bytes() else None


def synchronisations(device: Device, step: Step) -> list[str]:
    """Where `step` waits for the device: `file:line` of each; on a CPU, operations that would wait."""
    if not device.is_cuda:
        names: list[str] = []
        with _NameReads(names):
            step()
        return names
    with _sync_debug_mode("warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    return [
        f"{warning.filename}:{warning.lineno}" for warning in caught if _WAIT_WARNING in str(warning.message)
    ]


def require_no_synchronisation(device: Device, step: Step) -> None:
    """On a GPU, run `step` so that a wait for the device raises a `RuntimeError` with its stack."""
    if device.is_cuda:
        with _sync_debug_mode("error"):
            step()


@contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _NameReads(TorchDispatchMode):
    """Appends the name of each operation that hands a value to Python."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func) in _READS:
            self._names.append(str(func))
        return func(*args, **(kwargs or {}))
