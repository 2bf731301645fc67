"""The `Engine` interface that the training loop uses, and the settings that all engines share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeAlias

import torch
from pydantic import BeforeValidator
from torch import Tensor

from distft.checkpoint.fragments import Fragment
from distft.checkpoint.sources import StateSource
from distft.config import Settings
from distft.data.batch import Batch
from distft.optim.adamw import ParameterGroup

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# (model, micro-batch) -> loss terms [K], each already divided by what it is a mean over
LossTermsFn: TypeAlias = Callable[[Callable[..., Mapping[str, Tensor]], Batch], Tensor]
GroupLr: TypeAlias = Callable[[ParameterGroup], float]  # a group's learning rate in this step


# What the backward recomputes to save memory: nothing, all but products and attention, or whole blocks.
ActivationCheckpointing = Literal["none", "selective", "full"]


def _from_bool(value: Any) -> Any:
    """Until format version 2 the setting was a boolean, and so it is in older files."""
    return {True: "full", False: "none"}[value] if isinstance(value, bool) else value


class EngineSettings(Settings):
    """Settings common to all engines."""

    param_dtype: Precision = "fp32"  # of weights and activations; updates are fp32
    activation_checkpointing: Annotated[ActivationCheckpointing, BeforeValidator(_from_bool)] = "none"
    compile: bool | Literal["auto"] = "auto"  # torch.compile each block: slower to start, then faster
    fp8: Literal["none", "tensorwise", "rowwise"] = (
        "none"  # scaling of FP8 matrix products
    )
    allow_tf32: bool = False  # on a GPU, multiply fp32 matrices with 10 bits of mantissa: faster


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

    def forward_backward(self, micro_batches: Sequence[Batch], loss_terms: LossTermsFn) -> Tensor:
        """Accumulate the gradients of this rank's micro-batches of one step; return their terms [K], added.

        The loss is the sum of all terms of all micro-batches and ranks. The terms are detached, still on the
        device, and those of this rank alone. Every rank passes the same number of micro-batches.
        """

    def step(self, group_lr: GroupLr) -> UpdateResult:
        """Clip, update, clear the gradients; change nothing if a gradient is not finite."""

    def set_loss_scale(self, scale: float) -> None:
        """fp16 only: the factor of the loss in `forward_backward`, by which `step` divides gradients."""

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
