"""FP8 linear layers, by torchao: weights, checkpoints and names stay those of the plain layers."""

import dataclasses
import logging
from typing import Literal

import torch
from torch import nn

from distft.errors import ConfigError

_MULTIPLE = 16  # both sizes of an FP8 product are multiples of it
# Compute capabilities of GPUs with FP8 tensor cores: Ada and later; a scale for each row needs Hopper.
_MIN_CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}


def require_fp8(scaling: Literal["tensorwise", "rowwise"], device: torch.device) -> None:
    """Raise `ConfigError` if FP8 products cannot run here. A CPU emulates them, slowly, for tests."""
    # torchao warns on import of kernels that this machine lacks, and torch of torchao's old calls.
    disabled_before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"engine.fp8={scaling} needs torchao, which cannot be imported ({error}): install distft[fp8], "
            "or set engine.fp8=none."
        ) from None
    finally:
        logging.disable(disabled_before)
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _MIN_CAPABILITY[scaling]:
        needed = ".".join(map(str, _MIN_CAPABILITY[scaling]))
        raise ConfigError(
            f"engine.fp8={scaling} needs a GPU of compute capability {needed}, but "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}: set engine.fp8=none."
        )


def require_fp8_layers(blocks: nn.Module, scaling: str, min_features: int) -> None:
    """Raise `ConfigError` if no linear layer of `blocks` is large enough for `use_fp8`. Needs no torchao."""
    if not any(_fits(module, min_features) for module in blocks.modules()):
        raise ConfigError(
            f"engine.fp8={scaling}: no linear layer has engine.fp8_min_features={min_features} or more "
            f"inputs and outputs, in multiples of {_MULTIPLE}; products of experts have no FP8. Set "
            "engine.fp8=none, or lower it."
        )


def _fits(module: nn.Module, min_features: int) -> bool:
    sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (0, 0)
    return min(sizes) >= max(min_features, 1) and not any(size % _MULTIPLE for size in sizes)


def use_fp8(
    blocks: nn.Module, scaling: Literal["tensorwise", "rowwise"], *, min_features: int, emulate: bool
) -> None:
    """Have the linear layers of `blocks` multiply in FP8 if both of their sizes are at least `min_features`.

    In smaller products the casts cost more than they save. Embedding and heads keep their dtype: their errors
    reach the loss undamped. Raises `ConfigError` if no layer is large enough.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    require_fp8_layers(blocks, scaling, min_features)
    # The product for a weight's gradient sums over the tokens of a micro-batch: any number, so it is padded.
    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(scaling), emulate=emulate, pad_inner_dim=True
    )
    convert_to_float8_training(
        blocks, module_filter_fn=lambda module, _: _fits(module, min_features), config=config
    )
