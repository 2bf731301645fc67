"""Frozen weights of linear layers in 8 or 4 bits, whole on every rank; checkpoints have them as they came."""

from collections.abc import Iterator

import torch
from torch import nn

from distft.checkpoint.fragments import Fragment, even_slice
from distft.checkpoint.sources import StateSource
from distft.engine.original_weights import OriginalWeights, read_weight
from distft.model.layers import Linear
from distft.model.lora import LoraLinear
from distft.model.quantized import QuantizedMatrix


def quantizable_weights(module: nn.Module) -> dict[str, Linear]:
    """Name of the weight -> layer, of the linear layers in blocks.

    These are most of a model. Heads, embeddings and experts are not among them.
    """
    return {
        f"{name}.weight": layer
        for name, layer in module.named_modules()
        if type(layer) in {Linear, LoraLinear} and "blocks." in name
    }


class QuantizedWeights:
    """The weights that `frozen_bits` takes from the parameters of a module."""

    def __init__(self, module: nn.Module, bits: int | None, device: torch.device, dtype: torch.dtype) -> None:
        """`module` is on the meta device, with `requires_grad` set; `dtype` is what other weights have."""
        self._dtype = dtype
        self._matrices: dict[str, QuantizedMatrix] = {}
        if bits is None:
            return
        for name, layer in quantizable_weights(module).items():
            if not layer.weight.requires_grad:
                layer.quantized = QuantizedMatrix(layer.weight.shape, bits, device)
                self._matrices[name] = layer.quantized
                layer.register_parameter("weight", None)

    def load(self, source: StateSource) -> None:
        """Read each weight and round it; only one of them is in memory whole at a time."""
        for name, matrix in self._matrices.items():
            values = read_weight(source, name, 0, matrix.shape.numel(), self._dtype)
            matrix.set(values.view(matrix.shape))

    def fragments(self, originals: OriginalWeights, rank: int = 0, world_size: int = 1) -> Iterator[Fragment]:
        """This rank's even slices of the weights as they came."""
        for name, matrix in self._matrices.items():
            yield originals.unloaded(name, *even_slice(matrix.shape.numel(), rank, world_size))
