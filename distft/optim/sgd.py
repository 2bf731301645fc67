"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from distft.config import WidthRole
from distft.optim.settings import Beta, OptimizerSettings, UpdateRule, WeightDecay, param_groups

if TYPE_CHECKING:
    import torch

    from distft.optim.groups import ParameterGroup
    from distft.optim.segments import Segment


class SgdConfig(OptimizerSettings):
    """torch's SGD: m = momentum * m + gradient + weight_decay * weight; the weight loses rate * m.

    The weight decay is part of the gradient, so it acts through momentum and rate.
    """

    type: Literal["sgd"] = "sgd"
    peak_lr: float = Field(0.1, gt=0, allow_inf_nan=False)
    weight_decay: WeightDecay = 1e-4  # of matrices only
    momentum: Beta = 0.9
    nesterov: bool = False

    @model_validator(mode="after")
    def _check_nesterov(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=true needs a momentum above 0")
        return self

    @property
    def rule(self) -> UpdateRule:
        return UpdateRule(("momentum_buffer",) if self.momentum else ())

    def width_power(self, role: WidthRole, rule: UpdateRule) -> float | None:  # noqa: ARG002
        return {"input": 1.0, "hidden": 0.0, "output": -1.0, "finite": 0.0}[role]

    def group_settings(self, group: ParameterGroup) -> dict[str, Any]:  # noqa: ARG002
        return {"momentum": self.momentum, "nesterov": self.nesterov}

    def build(
        self, segments: Sequence[Sequence[Segment]], groups: Sequence[ParameterGroup]
    ) -> torch.optim.Optimizer:
        from distft.optim.kernels import EagerSGD

        return EagerSGD(
            param_groups(segments, groups),
            lr=self.peak_lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            fused=True,
        )
