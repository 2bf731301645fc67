"""The `Engine` interface that the training loop uses, and the settings that all engines share."""

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
    """Settings common to all engines."""

    param_dtype: Precision = "fp32"  # of weights and activations; updates are fp32
    activation_checkpointing: bool = False  # recompute blocks in the backward to save memory
    compile: bool = False  # torch.compile each block: slower to start, then faster


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """Result of one optimizer update, as device scalars: reading them waits for the device."""

    grad_norm: Tensor  # before clipping; inf or nan if the update was skipped
    is_skipped: Tensor  # 1.0 if gradients were not finite, so nothing changed


class Engine(Protocol):
    """Computes gradients, sums them over ranks, and applies them.

    Gradients *add* over micro-batches and ranks. The caller divides the loss by the count of the whole global
    batch, so the result does not depend on how the batch was split.
    """

    device: torch.device

    @property
    def module(self) -> torch.nn.Module:
        """The model itself, for its parameter names and its train/eval mode."""

    def model(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass."""

    def micro_step(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward; if `is_last`, gradients are reduced over ranks."""

    def backward(self, loss: Tensor) -> Tensor:
        """Accumulate gradients of `loss`; return it detached, still on the device."""

    def step(self, lr: float) -> UpdateResult:
        """Clip, update with `lr` times each group's `lr_scale`, clear; skip if a gradient is not finite."""

    def set_loss_scale(self, scale: float) -> None:
        """fp16 only: `backward` multiplies the loss by this factor, `step` divides the gradients by it."""

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """Sum over ranks."""

    def fragments(self) -> Iterator[Fragment]:
        """This rank's fragments of weights and moments; together the ranks yield each element once."""

    def updates(self) -> dict[str, int]:
        """The number of optimizer updates that each trainable parameter has had."""

    def load_fragments(self, source: StateSource) -> None:
        """Read weights, moments and update counts from `source`; each rank reads its own slices."""

    def close(self) -> None:
        """Free the memory; the engine cannot be used afterwards."""
