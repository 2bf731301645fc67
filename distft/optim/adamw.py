"""AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distft.config import WidthRole
from distft.optim.settings import (
    WIDTH_POWERS_OF_ADAM,
    Beta,
    OptimizerSettings,
    UpdateRule,
    param_groups,
)

if TYPE_CHECKING:
    import torch

    from distft.optim.groups import ParameterGroup
    from distft.optim.segments import Segment

ADAMW_MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names


class AdamWConfig(OptimizerSettings):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

    type: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)

    @property
    def rule(self) -> UpdateRule:
        return UpdateRule(ADAMW_MOMENTS)

    def width_power(self, role: WidthRole, rule: UpdateRule) -> float | None:  # noqa: ARG002
        return WIDTH_POWERS_OF_ADAM[role]

    def group_settings(self, group: ParameterGroup) -> dict[str, Any]:  # noqa: ARG002
        return {"betas": list(self.betas), "eps": self.eps}

    def build(
        self, segments: Sequence[Sequence[Segment]], groups: Sequence[ParameterGroup]
    ) -> torch.optim.Optimizer:
        from distft.optim.kernels import EagerAdamW

        return EagerAdamW(
            param_groups(segments, groups), lr=self.peak_lr, betas=self.betas, eps=self.eps, fused=True
        )
