"""Muon's update of matrices, whose slices may lie on several ranks, and AdamW's of the rest."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from distft.optim.kernels import EagerAdamW, count_update, finite_gradients, with_gradient
from distft.optim.segments import MasterSlice, Segment

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's, steep at zero
_NUM_ITERATIONS = 5
_EPS = 1e-7

# (this rank's slices of matrices, by parameter; a function of a matrix): replaces the matrices by its values
ReplaceMatrices: TypeAlias = Callable[[Mapping[str, Tensor], Callable[[Tensor], Tensor]], None]


class Muon(EagerAdamW):
    """AdamW, except for the param_groups with a momentum, whose tensors are slices of matrices."""

    def __init__(
        self,
        params: Any,
        segments: Sequence[Segment],
        *,
        nesterov: bool,
        scale: Callable[[tuple[int, ...]], float],
        is_bf16: bool,
        **adamw: Any,
    ) -> None:
        """`segments` of matrices, each of which is of one; `scale` of the rate, by a matrix's shape."""
        super().__init__(params, fused=True, **adamw)
        self._slices = {id(segment.values): segment.slices[0] for segment in segments}
        self._nesterov = nesterov
        self._scale = scale
        self._orthogonalized = partial(orthogonalized, dtype=torch.bfloat16 if is_bf16 else torch.float32)
        shapes = {own.parameter: own.shape for own in self._slices.values()}
        self.replace_matrices: ReplaceMatrices = lambda own, function: _replace_whole(own, shapes, function)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        all_groups = self.param_groups
        self._update_matrices()
        self.param_groups = [group for group in all_groups if "momentum" not in group]
        super().step(closure)
        self.param_groups = all_groups

    def _update_matrices(self) -> None:
        """By their momenta. Every rank calls this, also one that has none of them."""
        updated: list[tuple[MasterSlice, Tensor, Tensor, dict[str, Any]]] = []
        share: Tensor | float = 1.0
        for group in self.param_groups:
            params = with_gradient(group["params"]) if "momentum" in group else []
            gradients, share = finite_gradients(self, params)
            for param, gradient in zip(params, gradients, strict=True):
                own = self._slices[id(param)]
                direction, momentum = gradient[: own.numel], self.state[param]["muon_momentum"][: own.numel]
                momentum.lerp_(direction, (1 - group["momentum"]) * share)
                if self._nesterov:
                    direction.lerp_(momentum, group["momentum"])
                else:
                    direction.copy_(momentum)
                updated.append((own, param[: own.numel], direction, group))
            count_update(self, params)
        self.replace_matrices(
            {own.parameter: direction for own, _, direction, _ in updated}, self._orthogonalized
        )
        for own, values, direction, group in updated:
            values.mul_(1 - group["lr"] * group["weight_decay"] * share)
            values.add_(direction.mul_(share), alpha=-group["lr"] * self._scale(own.shape))


def _replace_whole(
    own: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    function: Callable[[Tensor], Tensor],
) -> None:
    """`ReplaceMatrices` where this rank has each matrix whole."""
    for name, values in own.items():
        values.copy_(function(values.view(shapes[name])).reshape(-1))


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """U V^T of a matrix U S V^T, about: singular values from 0.5 to 1.5, by Newton-Schulz in `dtype`."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.size(0) > matrix.size(1)
    rows = matrix.to(dtype).T if is_tall else matrix.to(dtype)
    rows = rows / rows.norm().clamp(min=_EPS)
    for _ in range(_NUM_ITERATIONS):
        gram = rows @ rows.T
        rows = torch.addmm(rows, torch.addmm(gram, gram, gram, beta=b, alpha=c), rows, beta=a)
    return rows.T if is_tall else rows
