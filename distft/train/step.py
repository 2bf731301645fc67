"""One optimizer step, whatever the model, objective, or engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from distft.data.batch import Batch
from distft.engine.interface import Engine


class SummedLoss(Protocol):
    """An objective, as far as a step cares."""

    def __call__(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The loss summed over the batch's targets, a scalar that can be differentiated."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Device scalars: whoever logs them pays for the wait, the step does not."""

    loss: Tensor  # mean over every target token of the global batch
    grad_norm: Tensor  # before clipping
    num_tokens: Tensor  # targets in the global batch
    is_skipped: Tensor  # 1.0 where gradients were not finite


def train_step(
    engine: Engine,
    objective: SummedLoss,
    micro_batches: Sequence[Batch],
    *,
    lr: float,
    before_forward: Callable[[int], None] | None = None,
) -> StepResult:
    """Forward, backward and update over this rank's part of one global batch.

    Dividing by the targets of the *global* batch makes loss and gradient independent of how it was cut.
    `before_forward` is called with each micro-batch's index; it seeds the random draws of dropout.
    """
    mine = sum(batch.num_target_tokens for batch in micro_batches)
    num_tokens = engine.all_reduce_sum(torch.tensor(mine, device=engine.device))
    loss = torch.zeros((), device=engine.device)
    for index, batch in enumerate(micro_batches):
        if before_forward is not None:
            before_forward(index)
        with engine.micro_step(is_last=index + 1 == len(micro_batches)):
            loss_sum = objective(engine.model, batch.to(engine.device))
            loss = loss + engine.backward(loss_sum / num_tokens)
    update = engine.step(lr)
    return StepResult(engine.all_reduce_sum(loss), update.grad_norm, num_tokens, update.is_skipped)
