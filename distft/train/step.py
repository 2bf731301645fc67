"""One optimizer step, for any model, objective and engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distft.data.batch import Batch
from distft.engine.interface import Engine, GroupLr
from distft.objective.interface import Model


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results of a step on the device: reading one waits for the device."""

    loss: Tensor  # weighted sum of the terms
    terms: Tensor  # [K] mean of each term over its targets in the global batch
    num_targets: Tensor  # int64 [K], in the global batch
    grad_norm: Tensor  # before clipping
    is_skipped: Tensor  # 1.0 if gradients were not finite, or the batch had no targets
    signals: Tensor  # int64 [S], summed over ranks


def train_step(
    engine: Engine,
    micro_batches: Sequence[Batch],
    *,
    loss_sums: Callable[[Model, Batch], Mapping[str, Tensor]],
    num_targets: Callable[[Batch], Mapping[str, int]],
    weights: Mapping[str, float],
    group_lr: GroupLr,
    signals: Sequence[int] = (),
) -> StepResult:
    """Forward, backward and update over this rank's share of one global batch.

    Each term is divided by the number of its targets in the *global* batch, so that loss and gradient do not
    depend on how the batch is split. `signals` are summed over ranks along with these counts.
    """
    local = [sum(num_targets(batch).get(name, 0) for batch in micro_batches) for name in weights]
    totals = engine.all_reduce_sum(torch.tensor([*local, *signals]).to(engine.device, non_blocking=True))
    counts = totals[: len(weights)]
    # A step without any target divides by zero on purpose: no engine applies a gradient that is not finite.
    divisors = counts.clamp(min=(counts.sum() > 0).long())
    scale = torch.tensor(list(weights.values())).to(engine.device, non_blocking=True)

    def loss_terms(model: Model, batch: Batch) -> Tensor:
        sums = loss_sums(model, batch)
        return torch.stack([sums[name] for name in weights]) * scale / divisors

    terms = engine.all_reduce_sum(engine.forward_backward(micro_batches, loss_terms))
    update = engine.step(group_lr)
    return StepResult(
        terms.sum(), terms / scale, counts, update.grad_norm, update.is_skipped, totals[len(weights) :]
    )
