"""One optimizer step, for any model, objective and engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distft.data.batch import AnyBatch
from distft.engine.interface import Engine, GroupLr
from distft.objective.interface import Model
from distft.train.transfers import DeferredRead, to_device


@dataclass(frozen=True, slots=True)
class StepResult:
    """Results of a step on the device: reading one waits for the device."""

    loss: Tensor  # weighted sum of the terms
    terms: Tensor  # [K] mean of each term over its targets in the global batch
    is_measured: Tensor  # bool [K]: the term has targets in this batch and a weight other than 0
    num_targets: Tensor  # int64 [K], in the global batch
    num_tokens: Tensor  # int64, of the global batch, without padding
    sums: Tensor  # [M] `training_sums` over the global batch
    grad_norm: Tensor  # before clipping
    is_skipped: Tensor  # 1.0 if gradients were not finite, or the batch had no targets
    signals: DeferredRead  # int64 [S], summed over ranks, since the start of the step


def train_step(
    engine: Engine,
    micro_batches: Sequence[AnyBatch],
    *,
    loss_sums: Callable[[Model, AnyBatch], Mapping[str, Tensor]],
    num_targets: Callable[[AnyBatch], Mapping[str, int]],
    training_sums: Callable[[AnyBatch], Mapping[str, Tensor]] = lambda _: {},
    sum_names: Sequence[str] = (),
    weights: Mapping[str, float],
    group_lr: GroupLr,
    signals: Sequence[int] = (),
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward, backward and update over this rank's share of one global batch.

    Each term is divided by the number of its targets in the *global* batch, so that loss and gradient do not
    depend on how the batch is split. `training_sums` gives the sums `sum_names` over a micro-batch, or some
    of them, and `loss_sums` others beside its terms; they are added over micro-batches and ranks. `signals`
    are summed over ranks along with the counts; reading them waits until the device has begun this step, so
    that it may run at most one step behind the host.
    """
    local = [sum(num_targets(batch).get(name, 0) for batch in micro_batches) for name in weights]
    num_tokens = sum(batch.num_real_tokens for batch in micro_batches)
    totals = engine.all_reduce_sum(to_device([num_tokens, *local, *signals], engine.device))
    counts, summed_signals = totals[1 : len(weights) + 1], DeferredRead(totals[len(weights) + 1 :])
    # A step without any target divides by zero on purpose: no engine applies a gradient that is not finite.
    divisors = counts.clamp(min=(counts.sum() > 0).long())
    scale = to_device(list(weights.values()), engine.device)

    found: list[Mapping[str, Tensor]] = []

    def loss_terms(model: Model, batch: AnyBatch) -> Tensor:
        sums = loss_sums(model, batch)
        found.append({name: sums[name].detach() for name in sum_names if name in sums})
        return torch.stack([sums[name] for name in weights]) * scale / divisors

    local_terms = engine.forward_backward(micro_batches, loss_terms)
    found += [training_sums(batch) for batch in micro_batches if sum_names]
    local_sums = _added(found, sum_names, like=local_terms)
    reduced = engine.all_reduce_sum(torch.cat([local_terms, local_sums]))
    terms, sums = reduced[: len(weights)], reduced[len(weights) :]
    before_update()
    update = engine.step(group_lr)
    has_weight = scale != 0
    return StepResult(
        loss=terms.sum(),
        terms=torch.where(has_weight, terms / scale, 0.0),
        is_measured=has_weight & (counts > 0),
        num_targets=counts,
        num_tokens=totals[0],
        sums=sums,
        grad_norm=update.grad_norm,
        is_skipped=update.is_skipped,
        signals=summed_signals,
    )


def _added(found: Sequence[Mapping[str, Tensor]], names: Sequence[str], *, like: Tensor) -> Tensor:
    """The sums [M] of these names, in `like`'s dtype and on its device."""
    added = like.new_zeros(len(names))
    for sums in found if names else ():
        own = [sums[name].to(added) if name in sums else added.new_zeros(()) for name in names]
        added += torch.stack(own)
    return added
