"""torch's optimizers without torch's compiler, Lion, and what they have in common.

torch wraps the methods of its optimizers to tell its compiler where to stop, even if nothing is ever
compiled; that imports `torch._dynamo`: 1.5 s at the start of every rank. `step` must therefore not be called
in compiled code, which distft does not do.
"""

from collections.abc import Callable, Iterable, Sequence
from inspect import unwrap
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

STEP = "step"  # the count of updates, among a tensor's states


class EagerAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        return _adamw_step(self, closure)


class EagerSGD(torch.optim.SGD):
    """`torch.optim.SGD` that counts its updates, as the others do."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            count_update(self, with_gradient(group["params"]))
        return _sgd_step(self, closure)


class Lion(Optimizer):
    """EvoLved Sign Momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2)."""

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            params = with_gradient(group["params"])
            if not params:
                continue
            (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            gradients, share = finite_gradients(self, params)
            averages = [self.state[param]["exp_avg"] for param in params]
            # In the gradients' memory: g - m, with which the average becomes m + (1 - beta2) (g - m), and
            # from that the update is the sign of m + (1 - beta1) (g - m).
            torch._foreach_sub_(gradients, averages)
            torch._foreach_mul_(gradients, share)
            torch._foreach_add_(averages, gradients, alpha=1 - beta2)
            torch._foreach_mul_(gradients, beta2 - beta1)
            torch._foreach_add_(gradients, averages)
            torch._foreach_sign_(gradients)
            torch._foreach_mul_(gradients, share)
            torch._foreach_mul_(params, 1 - lr * decay * share)
            torch._foreach_add_(params, gradients, alpha=-lr)
            count_update(self, params)


class FlatOptimizer(Optimizer):
    """What DeepSpeed takes for the optimizer: it passes each step on, with the buffers to update.

    Until `update` is set, a step does nothing: DeepSpeed does one with gradients of zero when it is built.
    """

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(params, {"lr": 0.0})
        self.update: Callable[[list[Tensor]], None] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        if self.update is not None:
            self.update([param for group in self.param_groups for param in group["params"]])


def set_clip_and_skip(
    optimizer: Optimizer, grad_norm: Tensor, *, loss_scale: Tensor | None, max_grad_norm: float | None
) -> Tensor:
    """Have the next update divide gradients by `loss_scale`, clip them, and skip if they are not finite.

    `grad_norm` is that of the unscaled gradients. Returns 1.0 for a skipped update. The fused kernels divide
    gradients by `grad_scale` and change nothing if `found_inf` is 1, so clipping needs no pass over the
    gradients, and neither waits for the device.
    """
    divisor = torch.ones_like(grad_norm) if loss_scale is None else loss_scale.to(grad_norm.dtype)
    if max_grad_norm is not None:  # as torch's clip_grad_norm_ does, its 1e-6 included
        divisor = divisor * ((grad_norm + 1e-6) / max_grad_norm).clamp(min=1.0)
    is_skipped = (~torch.isfinite(grad_norm)).float()
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]
    optimizer.found_inf = is_skipped  # type: ignore[attr-defined]
    return is_skipped


def with_gradient(params: Iterable[Tensor]) -> list[Tensor]:
    return [param for param in params if param.grad is not None]


def finite_gradients(optimizer: Optimizer, params: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | float]:
    """The gradients, divided by `grad_scale` in place, and 1, or 0 if this update is to change nothing.

    Then gradients are finite all the same, so that an update times 0 is no change.
    """
    gradients = [param.grad for param in params if param.grad is not None]
    is_skipped = getattr(optimizer, "found_inf", None)
    if is_skipped is None:
        return gradients, 1.0
    if gradients:
        torch._foreach_div_(gradients, optimizer.grad_scale)  # type: ignore[attr-defined]
    for gradient in gradients:
        gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return gradients, 1 - is_skipped


def count_update(optimizer: Optimizer, params: Sequence[Tensor]) -> None:
    """Add 1 to the counts of updates, unless this one is skipped."""
    is_skipped = getattr(optimizer, "found_inf", None)
    if params:
        steps = [optimizer.state[param][STEP] for param in params]
        torch._foreach_add_(steps, 1.0 if is_skipped is None else 1 - is_skipped)


_adamw_step: Callable[..., Any] = unwrap(torch.optim.AdamW.step)
_sgd_step: Callable[..., Any] = unwrap(torch.optim.SGD.step)
