"""The product of rows with matrices of which each serves a run of rows: one for each expert.

It is an operation of torch's own kind, so that torch.compile and activation checkpointing see one operation
and not a loop. Shape letters: R rows, E matrices, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor

_ALIGNED = 8  # bf16 elements in the 16 bytes that the GPU's kernel reads at once


@torch.library.custom_op("distft::grouped_product", mutates_args=())
def grouped_product(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """[R, O]: rows [ends[e - 1], ends[e]) of `x_RI` times the transpose of matrix e; `ends_E` is int32.

    On a GPU with bf16 and sizes that are multiples of 8 nothing waits for it; otherwise it waits once.
    """
    if _has_kernel(x_RI, weight_EOI):
        return torch._grouped_mm(x_RI.contiguous(), weight_EOI.transpose(1, 2), offs=ends_E)
    y_RO = x_RI.new_zeros(len(x_RI), weight_EOI.shape[1])
    for expert, rows in _runs(ends_E):
        torch.mm(x_RI[rows], weight_EOI[expert].T, out=y_RO[rows])
    return y_RO


@torch.library.custom_op("distft::grouped_product_gradients", mutates_args=())
def _gradients(
    gradient_RO: Tensor, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    """Of the rows and of the matrices, each empty unless `needs` says that it is needed."""
    needs_x, needs_weight = needs
    gradient_RO = gradient_RO.contiguous()
    gradient_x = torch.empty_like(x_RI) if needs_x else x_RI.new_empty(0)
    gradient_weight = torch.zeros_like(weight_EOI) if needs_weight else weight_EOI.new_empty(0)
    if _has_kernel(x_RI, weight_EOI):
        if needs_x:
            gradient_x = torch._grouped_mm(gradient_RO, weight_EOI, offs=ends_E)
        if needs_weight:
            gradient_weight = torch._grouped_mm(gradient_RO.T, x_RI.contiguous(), offs=ends_E)
        return gradient_x, gradient_weight
    for expert, rows in _runs(ends_E):
        if needs_x:
            torch.mm(gradient_RO[rows], weight_EOI[expert], out=gradient_x[rows])
        if needs_weight:
            torch.mm(gradient_RO[rows].T, x_RI[rows], out=gradient_weight[expert])
    return gradient_x, gradient_weight


def _has_kernel(x_RI: Tensor, weight_EOI: Tensor) -> bool:
    """Whether torch has a kernel for all the products at once, which reads `ends` on the device."""
    is_aligned = not any(size % _ALIGNED for size in weight_EOI.shape[1:])
    return (
        x_RI.is_cuda
        and x_RI.dtype == torch.bfloat16
        and is_aligned
        and weight_EOI.is_contiguous()
        and torch.cuda.get_device_capability(x_RI.device) >= (9, 0)
    )


def _runs(ends_E: Tensor) -> list[tuple[int, slice]]:
    """Each matrix that has rows, with them."""
    ends = ends_E.tolist()
    runs = [
        (expert, slice(start, end)) for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    return [(expert, rows) for expert, rows in runs if rows.stop > rows.start]


@grouped_product.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:  # noqa: ARG001
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


@_gradients.register_fake
def _(
    gradient_RO: Tensor,  # noqa: ARG001
    x_RI: Tensor,
    weight_EOI: Tensor,
    ends_E: Tensor,  # noqa: ARG001
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    needs_x, needs_weight = needs
    gradient_x = torch.empty_like(x_RI) if needs_x else x_RI.new_empty(0)
    return gradient_x, torch.empty_like(weight_EOI) if needs_weight else weight_EOI.new_empty(0)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_RI, weight_EOI, ends_E = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    gradient_x, gradient_weight = _gradients(gradient_RO, x_RI, weight_EOI, ends_E, [needs_x, needs_weight])
    return gradient_x if needs_x else None, gradient_weight if needs_weight else None, None


grouped_product.register_autograd(_backward, setup_context=_save)
