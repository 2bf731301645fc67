"""Replaces a module's meta parameters by parameters in real memory."""

from collections.abc import Callable

import torch
from torch import nn


def replace_parameters(module: nn.Module, replace: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Replace each parameter `p` of `module` by `replace(p)`, one at a time; tied parameters stay tied."""
    replacements: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, param in list(owner.named_parameters(recurse=False)):
            if param not in replacements:
                replacements[param] = replace(param)
            setattr(owner, name, replacements[param])


def allocate(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter of `module` uninitialised memory; `requires_grad` and ties stay."""

    def uninitialised(param: nn.Parameter) -> nn.Parameter:
        values = torch.empty(param.shape, dtype=dtype, device=device)
        return nn.Parameter(values, requires_grad=param.requires_grad)

    replace_parameters(module, uninitialised)
