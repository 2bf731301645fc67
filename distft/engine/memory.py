"""Replaces a module's meta parameters by parameters in real memory."""

from collections.abc import Callable

import torch
from torch import nn

from distft.errors import ConfigError


def replace_parameters(module: nn.Module, replace: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Replace each parameter `p` of `module` by `replace(p)`, one at a time; tied parameters stay tied."""
    replacements: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, param in list(owner.named_parameters(recurse=False)):
            if param not in replacements:
                replacements[param] = replace(param)
            setattr(owner, name, replacements[param])


def allocate(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give every parameter of `module` uninitialised memory; `requires_grad` and ties stay.

    Raises `ConfigError` if the operating system refuses it.
    """

    def uninitialised(param: nn.Parameter) -> nn.Parameter:
        try:
            values = torch.empty(param.shape, dtype=dtype, device=device)
        except (RuntimeError, MemoryError) as error:  # torch has no class of its own for a CPU
            if device.type != "cpu":
                raise
            whole = sum(own.numel() for own in module.parameters()) * dtype.itemsize
            raise ConfigError(
                f"The model's weights, {whole:,} bytes, do not fit into this machine's memory: make the "
                f"model smaller, or share it among more ranks with engine.zero_stage=3. ({error})"
            ) from None
        return nn.Parameter(values, requires_grad=param.requires_grad)

    replace_parameters(module, uninitialised)
