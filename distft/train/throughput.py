"""Throughput of a run, and its share of the peak of the hardware: MFU, and with recomputation HFU."""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

from distft.data.batch import AnyBatch
from distft.model.counts import Flops
from distft.model.layers import MatmulDtype

# Dense bf16/fp16 matrix products on the tensor cores, in FLOP/s, from the vendors' data sheets. By the
# exact name that the driver gives: an L40 is no L4, and an H100 NVL is slower than an H100.
_DATA_SHEET_PEAKS: Mapping[str, float] = {
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
}


def peak_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """The device's matrix-product rate in FLOP/s: from its data sheet if known, else measured."""
    if device.type == "cuda" and dtype != torch.float32:
        known = _DATA_SHEET_PEAKS.get(torch.cuda.get_device_name(device))
        if known is not None:
            return known
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

    def __init__(
        self,
        *,
        flops: Mapping[str, Flops],
        recomputed_flops: Mapping[str, Flops] | None,
        peak_flops_per_s: Callable[[], float],
        world_size: int,
    ) -> None:
        """`flops` are those of a step's passes, by stream as in `Batch.work`.

        Activation checkpointing adds `recomputed_flops`.

        `peak_flops_per_s` is called by the first `read` that follows a step: measuring takes half a second,
        by which it would delay the first step.
        """
        self._flops = flops
        self._recomputed_flops = recomputed_flops
        self._peak_flops_per_s = cache(peak_flops_per_s)
        self._world_size = world_size
        self._started = time.perf_counter()
        self._num_steps = 0
        self._num_tokens = 0
        self._num_flops = self._num_recomputed_flops = 0.0
        self._data_wait_s = 0.0

    def add_step(self, micro_batches: Sequence[AnyBatch], num_ranks: int, data_wait_s: float) -> None:
        """Count one optimizer step; every rank computes about as much as these micro-batches take."""
        self._num_steps += 1
        for batch in micro_batches:
            self._num_tokens += batch.num_real_tokens * num_ranks
            for stream, work in batch.work.items():
                self._num_flops += self._flops[stream].of(*work) * num_ranks
                if self._recomputed_flops is not None:
                    recomputed = self._recomputed_flops[stream].of(*work)
                    self._num_recomputed_flops += recomputed * num_ranks
        self._data_wait_s += data_wait_s

    def restart(self) -> None:
        """Start a new interval now, so that no evaluation or save counts as training."""
        self._started = time.perf_counter()
        self._num_steps = self._num_tokens = 0
        self._num_flops = self._num_recomputed_flops = 0.0
        self._data_wait_s = 0.0

    def read(self) -> dict[str, float]:
        """Rates since the interval started, and start the next one. Empty if it had no step."""
        elapsed_s = time.perf_counter() - self._started
        num_steps, num_tokens, data_wait_s = self._num_steps, self._num_tokens, self._data_wait_s
        if not num_steps:
            self.restart()
            return {}
        available = self._peak_flops_per_s() * self._world_size * elapsed_s
        shares = {"mfu": self._num_flops / available}
        if self._recomputed_flops is not None:
            shares["hfu"] = shares["mfu"] + self._num_recomputed_flops / available
        self.restart()
        tokens_per_s = num_tokens / elapsed_s
        return {
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_rank": tokens_per_s / self._world_size,
            **shares,
            "step_s": elapsed_s / num_steps,
            "data_wait_s": data_wait_s / num_steps,
        }
