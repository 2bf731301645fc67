"""AdamW: its settings, and parameter groups by weight decay, learning rate and update count."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from distft.config import Settings
from distft.config.step_function import StepFunction, values_of
from distft.errors import ConfigError
from distft.optim.patterns import matching_names, no_match_message
from distft.optim.schedules import CosineConfig, ScheduleConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names
Beta = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # multiple of the learning rate


def _check_decay(decay: Any) -> Any:
    if any(not 0 < value < 1 for value in values_of(decay)):
        raise ValueError("a decay must be above 0 and below 1")
    return decay


Decay = Annotated[StepFunction, AfterValidator(_check_decay)]


class AdamWConfig(Settings):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    type: Literal["adamw"] = "adamw"
    peak_lr: float = Field(3e-4, gt=0, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.1, ge=0, allow_inf_nan=False)  # of matrices only
    decay_embeddings: bool = False  # decay embedding tables too
    max_grad_norm: float | None = Field(1.0, gt=0, allow_inf_nan=False)  # global norm; null: no clipping
    schedule: ScheduleConfig = CosineConfig()
    lr_scales: dict[str, Scale] = Field(default_factory=dict)  # by glob pattern; the last match counts
    # Of a moving average of the weights, from 0 to 1, or points [[step, decay], ...]; null: no average
    ema_decay: Decay | None = None

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the optimizer's own per-element states."""
        return ADAMW_MOMENTS

    def lr(self, step: int, total_steps: int) -> float:
        """The learning rate of update `step` (from 0), before any `lr_scales`."""
        return self.peak_lr * self.schedule.factor(step, total_steps)


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Trainable parameters with the same weight decay, learning rate and update count."""

    names: tuple[str, ...]  # in the model's order
    weight_decay: float
    lr_scale: float  # multiple of the run's learning rate
    updates: int  # optimizer updates so far, for Adam's bias correction


def parameter_groups(
    named_shapes: Mapping[str, tuple[int, ...]],
    trainable: Collection[str],
    config: AdamWConfig,
    updates: Mapping[str, int],
) -> list[ParameterGroup]:
    """Group the trainable parameters; groups, and names in each, are in the order of `named_shapes`.

    Weight decay applies to parameters of two or more dimensions, but to embedding tables (`embed` in the
    name) only with `decay_embeddings`. A name missing in `updates` has had none.

    Raises `ConfigError` that lists every pattern of `lr_scales` that matches neither a trainable nor a frozen
    parameter.
    """
    names = list(named_shapes)
    errors = [
        no_match_message("optim.lr_scales", pattern, names)
        for pattern in config.lr_scales
        if not matching_names(pattern, names)
    ]
    if errors:
        raise ConfigError("\n".join(errors))
    members: dict[tuple[float, float, int], list[str]] = {}
    for name, shape in named_shapes.items():
        if name in trainable:
            decay = config.weight_decay if has_weight_decay(name, shape, config) else 0.0
            key = (decay, _lr_scale(name, config), updates.get(name, 0))
            members.setdefault(key, []).append(name)
    return [ParameterGroup(tuple(group), *key) for key, group in members.items()]


def build_adamw(
    tensors: Mapping[str, Tensor], groups: Sequence[ParameterGroup], config: AdamWConfig
) -> torch.optim.AdamW:
    """torch's AdamW over the tensors that `groups` name, with one param_group for each."""
    from distft.optim.eager import EagerAdamW

    param_groups = [
        {
            "params": [tensors[name] for name in group.names],
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    return EagerAdamW(param_groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=True)


def set_clip_and_skip(
    optimizer: torch.optim.Optimizer,
    grad_norm: Tensor,
    *,
    loss_scale: Tensor | None,
    max_grad_norm: float | None,
) -> Tensor:
    """Have the next update divide gradients by `loss_scale`, clip them, and skip if they are not finite.

    `grad_norm` is that of the unscaled gradients. Returns 1.0 for a skipped update. The fused kernel divides
    gradients by `grad_scale` and changes nothing if `found_inf` is 1, so clipping needs no pass over the
    gradients, and neither waits for the device.
    """
    import torch

    divisor = torch.ones_like(grad_norm) if loss_scale is None else loss_scale.to(grad_norm.dtype)
    if max_grad_norm is not None:  # as torch's clip_grad_norm_ does, its 1e-6 included
        divisor = divisor * ((grad_norm + 1e-6) / max_grad_norm).clamp(min=1.0)
    is_skipped = (~torch.isfinite(grad_norm)).float()
    optimizer.grad_scale = divisor  # type: ignore[attr-defined]
    optimizer.found_inf = is_skipped  # type: ignore[attr-defined]
    return is_skipped


def has_weight_decay(name: str, shape: tuple[int, ...], config: AdamWConfig) -> bool:
    return len(shape) >= 2 and (config.decay_embeddings or "embed" not in name.lower())


def _lr_scale(name: str, config: AdamWConfig) -> float:
    scales = [scale for pattern, scale in config.lr_scales.items() if fnmatchcase(name, pattern)]
    return scales[-1] if scales else 1.0
