"""The Transformer's plain layers: linear, feed-forward, norm, embedding.

Shape letters: B rows, T positions, C = d_model.
"""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from distft.model.quantized import QuantizedMatrix, quantized_product
from distft.model.transformer_config import TransformerConfig


@cache
def _has_native_matmul(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions that multiply matrices of `dtype`."""
    probe = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.get(dtype)
    # If a future torch drops the probe, we trust torch's own choice of kernel.
    return probe is None or bool(getattr(torch.ops.mkldnn, probe, lambda: True)())


class MatmulDtype:
    """Chooses the dtype of matrix products: the operands' own, or fp32 where the CPU would emulate it.

    A CPU without bf16 instructions multiplies bf16 matrices at 1 to 20 GFLOP/s, and fp32 matrices at 90.
    There we widen the operands and round the result once, which is what a native bf16 product does too.
    """

    def __init__(self) -> None:
        self._emulated = tuple(d for d in (torch.bfloat16, torch.float16) if not _has_native_matmul(d))

    def __call__(self, operand: Tensor) -> torch.dtype:
        emulated = operand.device.type == "cpu" and operand.dtype in self._emulated
        return torch.float32 if emulated else operand.dtype


class Linear(nn.Linear):
    """`nn.Linear` that multiplies in the dtype `MatmulDtype` chooses; the output has the input's dtype.

    An engine may put `quantized` in place of a frozen `weight`, which is None then.
    """

    __call__: Callable[..., Tensor]
    quantized: QuantizedMatrix | None = None

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.matmul_dtype = MatmulDtype()

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where drawing nothing took half of the time to build a model
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.matmul_dtype(x)
        if dtype == x.dtype and self.quantized is None:
            return functional.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        return self.product(x.to(dtype), bias).to(x.dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """W x + `bias`, in the dtype of `x`."""
        if self.quantized is None:
            return functional.linear(x, self.weight.to(x.dtype), bias)
        y = quantized_product(x, self.quantized)
        return y if bias is None else y + bias


class GatedMLP(nn.Module):
    """Gated feed-forward (Shazeer 2020, arXiv:2002.05202), SwiGLU or GeGLU: `gate`, `up`, `down`."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)
        self.activation = activation_of(config)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x_BTC)) * self.up(x_BTC))


class MLP(nn.Module):
    """Plain feed-forward: `up`, GELU or ReLU, `down`."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)
        self.activation = activation_of(config)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_BTC)))


def make_mlp(config: TransformerConfig) -> nn.Module:
    return GatedMLP(config) if config.is_gated else MLP(config)


def activation_of(config: TransformerConfig) -> Callable[[Tensor], Tensor]:
    """The function of the feed-forward."""
    if config.mlp == "swiglu":
        return functional.silu
    if config.mlp == "relu":
        return functional.relu
    return partial(functional.gelu, approximate="tanh" if config.mlp in {"gelu", "geglu_tanh"} else "none")


def make_norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.norm_bias)


def make_embedding(num_rows: int, d_model: int) -> nn.Embedding:
    """`nn.Embedding` of zeros. torch's own initial draw would import its compiler on the meta device, 2 s."""
    return nn.Embedding(num_rows, d_model, _weight=torch.zeros(num_rows, d_model))
