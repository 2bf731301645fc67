"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distft.config import WidthRole
from distft.optim.adamw import ADAMW_MOMENTS
from distft.optim.patterns import matching_names
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

_MUON = UpdateRule(("muon_momentum",), is_by_matrix=True)
_ADAMW = UpdateRule(ADAMW_MOMENTS)


class MuonConfig(OptimizerSettings):
    """Orthogonalised momentum (Jordan et al. 2024; arXiv:2502.16982) for `matrices`, AdamW for the rest."""

    type: Literal["muon"] = "muon"
    matrices: tuple[str, ...] = ("*blocks.*",)  # patterns; of these, Muon updates those of two dimensions
    momentum: Beta = 0.95
    nesterov: bool = True
    # adamw: 0.2 sqrt(max(rows, columns)), an update as large as AdamW's, so that one rate fits both;
    # spectral: sqrt(max(1, rows / columns)), as in the original, whose rates are about 0.02
    update_scale: Literal["adamw", "spectral"] = "adamw"
    # Of the iteration's products. bf16 is torch's; its rounding differs between numbers of ranks by 1e-5
    iteration_dtype: Literal["bf16", "fp32"] = "bf16"
    betas: tuple[Beta, Beta] = (0.9, 0.95)  # of AdamW
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)  # of AdamW

    def rules(self, named_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, UpdateRule]:
        chosen = {name for pattern in self.matrices for name in matching_names(pattern, named_shapes)}
        return {
            name: _MUON if name in chosen and len(shape) == 2 else _ADAMW
            for name, shape in named_shapes.items()
        }

    def patterns(self) -> list[tuple[str, str]]:
        return [*super().patterns(), *(("matrices", pattern) for pattern in self.matrices)]

    def width_power(self, role: WidthRole, rule: UpdateRule) -> float | None:
        if not rule.is_by_matrix:
            return WIDTH_POWERS_OF_ADAM[role]
        # An update of a hidden matrix must keep its spectral norm at every width (Yang et al. 2023,
        # arXiv:2310.17813): `spectral` does, and `adamw` grows with the root of the width.
        if role == "hidden":
            return 0.0 if self.update_scale == "spectral" else -0.5
        return None

    def group_settings(self, group: ParameterGroup) -> dict[str, Any]:
        if group.rule.is_by_matrix:
            return {"momentum": self.momentum, "nesterov": self.nesterov}
        return {"betas": list(self.betas), "eps": self.eps}

    def scale(self, shape: tuple[int, ...]) -> float:
        """The multiple of the rate for a matrix."""
        rows, columns = shape
        if self.update_scale == "adamw":
            return 0.2 * sqrt(max(rows, columns))
        return sqrt(max(1, rows / columns))

    def build(
        self, segments: Sequence[Sequence[Segment]], groups: Sequence[ParameterGroup]
    ) -> torch.optim.Optimizer:
        from distft.optim.muon_kernel import Muon

        own_groups = param_groups(segments, groups)
        matrices: list[Segment] = []
        for own, group, settings in zip(segments, groups, own_groups, strict=True):
            if group.rule.is_by_matrix:
                settings["momentum"] = self.momentum
                matrices += own
        return Muon(
            own_groups,
            matrices,
            nesterov=self.nesterov,
            scale=self.scale,
            is_bf16=self.iteration_dtype == "bf16",
            lr=self.peak_lr,
            betas=self.betas,
            eps=self.eps,
        )
