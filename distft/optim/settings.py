"""Settings common to all optimizers, and what each optimizer tells of itself. Parsed without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from distft.config import Settings, WidthRole
from distft.config.step_function import StepFunction, values_of
from distft.optim.schedules import CosineConfig, ScheduleConfig

if TYPE_CHECKING:
    import torch

    from distft.optim.groups import ParameterGroup
    from distft.optim.segments import Segment

Beta = Annotated[float, Field(ge=0, lt=1)]
Scale = Annotated[float, Field(gt=0, allow_inf_nan=False)]  # multiple of the learning rate
WeightDecay = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _check_decay(decay: Any) -> Any:
    if any(not 0 < value < 1 for value in values_of(decay)):
        raise ValueError("a decay must be above 0 and below 1")
    return decay


Decay = Annotated[StepFunction, AfterValidator(_check_decay)]


# Of muP, for optimizers whose update does not depend on the size of the gradient: Adam and signs
WIDTH_POWERS_OF_ADAM: Mapping[WidthRole, float] = MappingProxyType(
    {"input": 0.0, "hidden": -1.0, "output": -1.0, "finite": 0.0}
)


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """What an optimizer keeps of a parameter, and whether it can update slices of it."""

    moments: tuple[str, ...]  # the names of its states, one number per element each
    is_by_matrix: bool = False  # an update needs the whole matrix


class OptimizerSettings(Settings, ABC):
    """What every optimizer has. A class outside distft inherits it and gives the methods below."""

    peak_lr: float = Field(3e-4, gt=0, allow_inf_nan=False)
    weight_decay: WeightDecay = 0.1  # of matrices only
    decay_embeddings: bool = False  # decay embedding tables too
    weight_decays: dict[str, WeightDecay] = Field(default_factory=dict)  # by pattern; the last match counts
    lr_scales: dict[str, Scale] = Field(default_factory=dict)  # by pattern; the last match counts
    # A block's rate as a multiple of the next one's; heads have the whole rate, embeddings the lowest
    layer_decay: float | None = Field(None, gt=0, le=1)
    max_grad_norm: float | None = Field(1.0, gt=0, allow_inf_nan=False)  # global norm; null: no clipping
    schedule: ScheduleConfig = CosineConfig()
    # Of a moving average of the weights, from 0 to 1, or points [[step, decay], ...]; null: no average
    ema_decay: Decay | None = None

    def lr(self, step: int, total_steps: int) -> float:
        """The learning rate of update `step` (from 0), before any scale of a group."""
        return self.peak_lr * self.schedule.factor(step, total_steps)

    def rules(self, named_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, UpdateRule]:
        """How each of the model's parameters is updated."""
        return dict.fromkeys(named_shapes, self.rule)

    @property
    def rule(self) -> UpdateRule:
        """How parameters are updated, if all are updated alike; one that gives `rules` has none."""
        raise NotImplementedError

    def width_power(self, role: WidthRole, rule: UpdateRule) -> float | None:  # noqa: ARG002
        """p, where muP multiplies the rate of a parameter by width ratio ** p; None: no rule is known."""
        return None

    def patterns(self) -> list[tuple[str, str]]:
        """Setting and pattern, of all that must match a parameter."""
        return [
            (setting, pattern)
            for setting in ("lr_scales", "weight_decays")
            for pattern in getattr(self, setting)
        ]

    @abstractmethod
    def group_settings(self, group: ParameterGroup) -> dict[str, Any]:
        """Plain numbers for the manifest, beside the rate and the weight decay."""

    @abstractmethod
    def build(
        self, segments: Sequence[Sequence[Segment]], groups: Sequence[ParameterGroup]
    ) -> torch.optim.Optimizer:
        """The optimizer of the tensors `Segment.values`, with one param_group for each of `groups`.

        Each tensor gets a state of zeros for each name of the group's rule, and `step`. `grad_scale`
        and `found_inf`, if set, are as for torch's fused optimizers.
        """


def param_groups(
    segments: Sequence[Sequence[Segment]], groups: Sequence[ParameterGroup]
) -> list[dict[str, Any]]:
    """torch's param_groups, without rates."""
    return [
        {"params": [segment.values for segment in own], "weight_decay": group.weight_decay}
        for own, group in zip(segments, groups, strict=True)
    ]
