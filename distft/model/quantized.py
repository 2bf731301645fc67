"""Frozen matrices in 8 or 4 bits an element, multiplied without a copy in full precision that stays.

Shape letters: O outputs, I inputs, N elements of the flattened matrix, G blocks of 64 of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

NF4_BLOCK = 64  # elements with one scale, of 4 bits
_LARGEST_8 = 127.0
# The values of NF4, quantiles of the normal distribution (Dettmers et al. 2023, arXiv:2305.14314, app. E).
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class QuantizedMatrix:
    """A matrix [O, I] in 8 bits with a scale for each row, or in NF4 with one for 64 elements."""

    def __init__(self, shape: torch.Size, bits: int, device: torch.device) -> None:
        """Without values until `set`. It is no parameter, so that no engine casts, shards or updates it."""
        self.shape, self.bits, self.device = shape, bits, device
        self._codes = torch.empty(0, dtype=torch.int8 if bits == 8 else torch.uint8, device=device)
        self._scales = torch.empty(0, device=device)

    def set(self, values: Tensor) -> None:
        """Round `values` to the nearest that the format has; they must be finite."""
        values = values.to(self.device, torch.float32)
        self._codes, self._scales = _codes8(values) if self.bits == 8 else _codes4(values)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """[O, I] as the model computes with it: a new tensor."""
        if self.bits == 8:
            return (self._codes * self._scales).to(dtype)
        table = torch.tensor(_NF4, device=self.device)
        pairs = torch.stack((self._codes >> 4, self._codes & 15), dim=-1)  # [G, 32, 2]
        blocks = table[pairs.flatten(1).int()] * self._scales
        return blocks.view(-1)[: self.shape.numel()].view(self.shape).to(dtype)


def _codes8(values_OI: Tensor) -> tuple[Tensor, Tensor]:
    scales = values_OI.abs().amax(dim=1, keepdim=True) / _LARGEST_8
    codes = (values_OI / _not_zero(scales)).round().to(torch.int8)
    return codes, scales


def _codes4(values_OI: Tensor) -> tuple[Tensor, Tensor]:
    flat_N = values_OI.reshape(-1)
    blocks = functional.pad(flat_N, (0, -len(flat_N) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    table = torch.tensor(_NF4, device=blocks.device)
    middles = (table[1:] + table[:-1]) / 2
    codes = torch.bucketize(blocks / _not_zero(scales), middles).to(torch.uint8)
    return (codes[:, 0::2] << 4) | codes[:, 1::2], scales


def _not_zero(scales: Tensor) -> Tensor:
    """A row of zeros stays one: 0 / 0 would be NaN."""
    return scales.clamp_min(torch.finfo(torch.float32).tiny)


class _Product(torch.autograd.Function):
    """x W^T, whose backward makes W anew: what autograd saves by itself would be W in full precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: QuantizedMatrix) -> Tensor:
        ctx.matrix = matrix
        return functional.linear(x, matrix.whole(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.matrix.whole(gradient.dtype), None


def quantized_product(x: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """[..., I] to [..., O] in the dtype of `x`; differentiable in `x` alone."""
    result: Tensor = _Product.apply(x, matrix)  # type: ignore[no-untyped-call]
    return result
