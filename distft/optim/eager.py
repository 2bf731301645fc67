"""torch's AdamW without torch's compiler."""

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import torch
from torch.optim import Optimizer


class EagerAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, whose methods do not import `torch._dynamo`: 1.5 s at the start of every rank.

    torch wraps them to tell its compiler where to stop, even if nothing is ever compiled. `step` must
    therefore not be called in compiled code, which distft does not do.
    """

    add_param_group = unwrap(Optimizer.add_param_group)
    zero_grad = unwrap(Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        return _step(self, closure)


_step: Callable[..., Any] = unwrap(torch.optim.AdamW.step)
