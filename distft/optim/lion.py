"""Lion."""

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
    WeightDecay,
    param_groups,
)

if TYPE_CHECKING:
    import torch

    from distft.optim.groups import ParameterGroup
    from distft.optim.segments import Segment


class LionConfig(OptimizerSettings):
    """The sign of a momentum (Chen et al. 2023, arXiv:2302.06675), with decoupled weight decay.

    Every update changes each weight by the rate, so the rate is 3 to 10 times lower than AdamW's, and the
    weight decay as many times higher.
    """

    type: Literal["lion"] = "lion"
    peak_lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    weight_decay: WeightDecay = 0.3  # of matrices only
    betas: tuple[Beta, Beta] = (0.9, 0.99)  # of the update, and of the momentum

    @property
    def rule(self) -> UpdateRule:
        return UpdateRule(("exp_avg",))

    def width_power(self, role: WidthRole, rule: UpdateRule) -> float | None:  # noqa: ARG002
        return WIDTH_POWERS_OF_ADAM[role]

    def group_settings(self, group: ParameterGroup) -> dict[str, Any]:  # noqa: ARG002
        return {"betas": list(self.betas)}

    def build(
        self, segments: Sequence[Sequence[Segment]], groups: Sequence[ParameterGroup]
    ) -> torch.optim.Optimizer:
        from distft.optim.kernels import Lion

        return Lion(param_groups(segments, groups), lr=self.peak_lr, betas=self.betas)
