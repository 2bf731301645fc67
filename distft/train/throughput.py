"""Throughput of a run, and its share of the peak of the hardware (MFU)."""

import resource
import time
from collections.abc import Mapping

import torch

from distft.model.layers import MatmulDtype

# Dense bf16/fp16 matrix products on the tensor cores, in FLOP/s, from the vendors' data sheets.
_KNOWN_PEAKS: Mapping[str, float] = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "B200": 2250e12,
}


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The device's matrix-product rate in FLOP/s: from its data sheet if known, else measured."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, flops_per_s in _KNOWN_PEAKS.items():
            if known in name:
                return flops_per_s
    return measured_flops_per_s(device, dtype)


def measured_flops_per_s(device: torch.device, dtype: torch.dtype, repetitions: int = 5) -> float:
    """The highest rate of several products of matrices large enough to occupy the device."""
    rows, inner, columns = (8192, 8192, 8192) if device.type == "cuda" else (2048, 1024, 1024)
    # On a CPU that only emulates bf16 or fp16 products the model computes them in fp32.
    dtype = MatmulDtype()(torch.empty(0, dtype=dtype, device=device))
    # Random operands: products of zeros run faster.
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, columns, device=device).to(dtype)
    best_s = float("inf")
    for _ in range(repetitions + 1):
        _synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * rows * inner * columns / best_s


def peak_memory_bytes(device: torch.device) -> int:
    """The allocator's peak on a GPU; the process's largest resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Throughput:
    """Measures rates between calls of `read`."""

    def __init__(self, *, flops_per_token: float, peak_flops_per_s: float, world_size: int) -> None:
        self._flops_per_token = flops_per_token
        self._peak_flops_per_s = peak_flops_per_s
        self._world_size = world_size
        self._started = time.perf_counter()
        self._num_steps = 0
        self._num_tokens = 0
        self._data_wait_s = 0.0

    def add_step(self, num_tokens: int, data_wait_s: float) -> None:
        """Count one optimizer step over `num_tokens` computed tokens, summed over ranks."""
        self._num_steps += 1
        self._num_tokens += num_tokens
        self._data_wait_s += data_wait_s

    def restart(self) -> None:
        """Start a new interval now, so that no evaluation or save counts as training."""
        self._started = time.perf_counter()
        self._num_steps = self._num_tokens = 0
        self._data_wait_s = 0.0

    def read(self) -> dict[str, float]:
        """Rates since the interval started, and start the next one. Empty if it had no step."""
        elapsed_s = time.perf_counter() - self._started
        num_steps, num_tokens, data_wait_s = self._num_steps, self._num_tokens, self._data_wait_s
        self.restart()
        if not num_steps:
            return {}
        tokens_per_s = num_tokens / elapsed_s
        available = self._peak_flops_per_s * self._world_size
        return {
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_rank": tokens_per_s / self._world_size,
            "mfu": tokens_per_s * self._flops_per_token / available,
            "step_s": elapsed_s / num_steps,
            "data_wait_s": data_wait_s / num_steps,
        }
