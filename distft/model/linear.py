"""Matrix products in the number format in which the device is fast."""

import torch
from torch import Tensor, nn
from torch.nn import functional


def _has_native_product(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of `dtype` with instructions of its own."""
    probe = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }.get(dtype)
    # Where a coming torch no longer has the probe, its own choice of kernel stands.
    return probe is None or bool(getattr(torch.ops.mkldnn, probe, lambda: True)())


class ProductFormat:
    """Chooses the format of matrix products: that of the operands, unless a CPU only emulates it.

    A CPU without bf16 instructions multiplies bf16 matrices at 1 to 20 GFLOP/s where it does 90 in fp32.
    There the operands are widened, and the result is rounded once: what a native bf16 product does too.
    """

    def __init__(self) -> None:
        self._emulated = tuple(d for d in (torch.bfloat16, torch.float16) if not _has_native_product(d))

    def __call__(self, operand: Tensor) -> torch.dtype:
        emulated = operand.device.type == "cpu" and operand.dtype in self._emulated
        return torch.float32 if emulated else operand.dtype


class Linear(nn.Linear):
    """`nn.Linear`, with the product in the format in which the device is fast."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.product_format = ProductFormat()

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.product_format(x)
        if dtype == x.dtype:
            return functional.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.linear(x.to(dtype), self.weight.to(dtype), bias).to(x.dtype)
