"""What the training loop asks of a backend, and the settings that every backend shares."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from distft.checkpoint.fragments import Fragment
from distft.checkpoint.sources import StateSource
from distft.config import Settings

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class EngineSettings(Settings):
    """What holds for every engine."""

    param_dtype: Precision = "fp32"  # weights and activations in the forward and backward; updates are fp32
    activation_checkpointing: bool = False  # recompute each block in the backward instead of keeping it
    compile: bool = False  # torch.compile: slower to start, faster to run


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """What one optimizer update did. Device scalars: whoever reads them pays for the wait."""

    grad_norm: Tensor  # before clipping; inf or nan where the update was skipped
    is_skipped: Tensor  # 1.0 where gradients were not finite, so nothing changed


class Engine(Protocol):
    """How gradients are computed, summed over ranks, and applied.

    Gradients *add* over micro-batches and ranks, and the caller divides the loss by whatever is to be the
    mean's count, so the sharing out of a batch does not show in the result.
    """

    device: torch.device

    @property
    def module(self) -> torch.nn.Module:
        """The model itself, for names and evaluation mode."""

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass."""

    def micro_step(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Surrounds one forward and backward; gradients cross ranks when `is_last`."""

    def backward(self, loss: Tensor) -> Tensor:
        """Accumulate gradients of `loss`; return it detached, still on the device."""

    def step(self, lr: float) -> UpdateResult:
        """Clip, update at `lr` times each group's scale, clear; skip if a gradient is not finite."""

    def set_loss_scale(self, scale: float) -> None:
        """fp16 only: what `backward` multiplies the loss by, and `step` divides the gradients by."""

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum over ranks."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's part of the run's state; all ranks' parts together are the whole, each element once."""

    def updates(self) -> dict[str, int]:
        """How many optimizer updates each trainable parameter has had."""

    def load_fragments(self, source: StateSource) -> None:
        """Take weights, moments and update counts from `source`; each rank reads what it holds."""

    def close(self) -> None:
        """Give the memory back; the engine is not used again."""
