"""From the meta device to real memory."""

import torch
from torch import nn


def allocate(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give every meta parameter of `module` uninitialised memory; ties and `requires_grad` stay."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, param in list(owner.named_parameters(recurse=False)):
            if param not in made:
                values = torch.empty(param.shape, dtype=dtype, device=device)
                made[param] = nn.Parameter(values, requires_grad=param.requires_grad)
            setattr(owner, name, made[param])
