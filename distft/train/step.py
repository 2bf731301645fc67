"""One optimizer step, for any model, objective and engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distft.data.batch import Batch
from distft.engine.interface import Engine


class SummedLossFn(Protocol):
    """Loss interface used by `train_step`."""

    def __call__(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss summed over the batch's targets, as a differentiable scalar."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Scalars on the device: reading one waits for the device."""

    loss: Tensor  # mean over every target token of the global batch
    grad_norm: Tensor  # before clipping
    num_tokens: Tensor  # targets in the global batch
    is_skipped: Tensor  # 1.0 if gradients were not finite


def train_step(
    engine: Engine,
    objective: SummedLossFn,
    micro_batches: Sequence[Batch],
    *,
    lr: float,
    before_forward: Callable[[int], None] | None = None,
) -> StepResult:
    """Forward, backward and update over this rank's share of one global batch.

    The loss is divided by the number of targets in the *global* batch, so that loss and gradient do not
    depend on how the batch is split. `before_forward` is called with each micro-batch's index.
    """
    num_local_tokens = sum(batch.num_target_tokens for batch in micro_batches)
    num_tokens = engine.all_reduce_sum(torch.tensor(num_local_tokens, device=engine.device))
    loss = torch.zeros((), device=engine.device)
    for index, batch in enumerate(micro_batches):
        if before_forward is not None:
            before_forward(index)
        with engine.micro_step(is_last=index + 1 == len(micro_batches)):
            loss_sum = objective(engine.model, batch.to(engine.device))
            loss = loss + engine.backward(loss_sum / num_tokens)
    update = engine.step(lr)
    return StepResult(engine.all_reduce_sum(loss), update.grad_norm, num_tokens, update.is_skipped)
