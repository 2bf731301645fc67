"""ZeRO 3 block by block: a block's weights are gathered before it and freed after it."""

from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from distft.engine.deepspeed_import import deepspeed

# A parameter, and the size and strides of the view of it that an operation saved for its backward
_SavedView: TypeAlias = tuple[nn.Parameter, torch.Size, tuple[int, ...]]


def gather_by_block(blocks: Iterable[nn.Module]) -> None:
    """Have stage 3 gather and free the weights of a whole block, not of each layer in it.

    Then DeepSpeed's hooks run around a block, and its inside can be compiled. Blocks become DeepSpeed's
    "leaf" modules only now: were they so at its start, it would reduce a block's gradients when the gradient
    of the block's input is there, which never comes if all before it is frozen.
    """
    for block in blocks:
        for layer in block.modules():
            if layer is not block:
                layer._forward_hooks.clear()
                layer._forward_pre_hooks.clear()
        deepspeed.utils.set_z3_leaf_module(block, True)


def free_weights_until_backward(block: nn.Module) -> None:
    """Have the backward of `block` use its parameters' values of that time, gathered once more.

    Otherwise a linear layer saves `weight.t()`, a view that keeps the gathered values in memory from the
    forward to the backward: in the end those of all blocks. Not for blocks that are compiled or checkpointed,
    which save the parameters themselves or nothing.
    """
    forward = block.forward

    def forward_without_views(*args: Any, **kwargs: Any) -> Any:
        gathered = {(param.data_ptr(), param.numel()): param for param in block.parameters()}

        def pack(saved: Tensor) -> Tensor | _SavedView:
            param = gathered.get((saved.data_ptr(), saved.numel()))
            return saved if param is None else (param, saved.size(), saved.stride())

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            return forward(*args, **kwargs)

    block.forward = forward_without_views


def _unpack(packed: Tensor | _SavedView) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    param, size, stride = packed
    return param.detach().as_strided(size, stride)
