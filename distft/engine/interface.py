"""The `Engine` interface that the training loop uses."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from distft.checkpoint.fragments import Fragment
from distft.checkpoint.sources import StateSource
from distft.data.batch import AnyBatch
from distft.engine.settings import Precision
from distft.optim.groups import ParameterGroup

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# (model, micro-batch) -> loss terms [K], each already divided by what it is a mean over
LossTermsFn: TypeAlias = Callable[[Callable[..., Mapping[str, Tensor]], AnyBatch], Tensor]
GroupLr: TypeAlias = Callable[[ParameterGroup], float]  # a group's learning rate in this step


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

    def forward_backward(self, micro_batches: Sequence[AnyBatch], loss_terms: LossTermsFn) -> Tensor:
        """Accumulate the gradients of this rank's micro-batches of one step; return their terms [K], added.

        The loss is the sum of all terms of all micro-batches and ranks. The terms are detached, still on the
        device, and those of this rank alone. Every rank passes the same number of micro-batches.
        """

    def step(self, group_lr: GroupLr) -> UpdateResult:
        """Clip, update, clear the gradients; change nothing if a gradient is not finite."""

    def set_loss_scale(self, scale: Tensor) -> None:
        """fp16 only: the factor of the loss in `forward_backward`, by which `step` divides gradients.

        A scalar on the device, which does not change until the next call.
        """

    def set_ema_decay(self, decay: float) -> None:
        """The decay of the weights' moving average in the next `step`, if the optimizer has an average."""

    def add_to_parameters(self, deltas: Mapping[str, Tensor]) -> None:
        """Add `deltas`, whole and equal on all ranks, to parameters that no gradient moves, between steps.

        Those are the ones for which `distft.optim.patterns.is_moved_by_rule` holds; they are kept in fp32.
        """

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The model computes with the weights' moving average, then with its own weights again, bit for bit.

        For forwards without gradient, between optimizer steps; frozen parameters stay as they are. All ranks
        enter and leave together. Only if the optimizer has an average.
        """

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
