"""Low-rank adapters in a model: linear layers with a product of two small matrices beside their weight.

Shape letters: B rows, T positions, I inputs, O outputs, R rank.
"""

from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional

from distft.errors import ConfigError
from distft.model.dropout import dropout
from distft.model.layers import Linear
from distft.model.layout import RowKeys
from distft.model.lora_config import LoraConfig
from distft.model.with_heads import ModelWithHeads

_MOST_LISTED = 12


class LoraLinear(Linear):
    """y = W x + scale * B A x; with DoRA (m / |W + scale * B A|) times that, for each output."""

    def __init__(self, linear: Linear, config: LoraConfig) -> None:
        """`linear` on the meta device; its weight and bias keep their names."""
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.scale, self.dropout = config.scale, config.dropout
        self.row_keys = RowKeys()
        self.lora_a = nn.Parameter(torch.empty(config.rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.empty(linear.out_features, config.rank))
        self.lora_magnitude: nn.Parameter | None = None
        if config.dora:
            self.lora_magnitude = nn.Parameter(torch.empty(linear.out_features))

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.matmul_dtype(x)
        inputs = x.to(dtype)
        low = functional.linear(self._dropped(inputs), self.lora_a.to(dtype)) * self.scale
        low = functional.linear(low, self.lora_b.to(dtype))
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.lora_magnitude is None:
            return (self.product(inputs, bias) + low).to(x.dtype)
        # A row of zeros stays one: 0 / 0 would be NaN.
        norms_O = self._row_norms().clamp_min(torch.finfo(torch.float32).tiny)
        y = (self.product(inputs, None) + low) * (self.lora_magnitude / norms_O).to(dtype)
        return (y if bias is None else y + bias).to(x.dtype)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        """fp32 [O]. Constant for the gradient, as in section 4.3 of the paper, which saves the memory."""
        delta_OI = self.lora_b.float() @ self.lora_a.float()
        weight_OI = self.weight if self.quantized is None else self.quantized.whole(torch.float32)
        return merged_row_norms(weight_OI, delta_OI, self.scale)

    def _dropped(self, x: Tensor) -> Tensor:
        keys_B = self.row_keys.of_rows
        if not self.training or not self.dropout or keys_B is None:
            return x
        # Some layers get the positions of all rows one behind the other.
        by_row = x.reshape(len(keys_B), -1, x.shape[-1])
        return dropout(by_row, self.dropout, keys_B, site=0).view(x.shape)


def merged_row_norms(weight_OI: Tensor, delta_OI: Tensor, scale: float) -> Tensor:
    """fp32 [O]: the length of each row of W + scale * delta."""
    merged_OI = torch.add(weight_OI.float(), delta_OI, alpha=scale)
    norms_O: Tensor = torch.linalg.vector_norm(merged_OI, dim=1)
    return norms_O


def add_adapters(model: ModelWithHeads, config: LoraConfig) -> None:
    """Put an adapter beside each linear layer that `config.targets` selects; call it on the meta device.

    Heads have none: they train in full. Raises one `ConfigError` with each pattern that matches no layer.
    """
    layers = dict(_linear_layers(model))
    if not layers:
        raise ConfigError(
            "lora: the model has no linear layer beside its heads, so that nothing can have an adapter: "
            "leave lora out, and name what trains in trainable."
        )
    others = [name for name, module in model.named_modules() if name and not isinstance(module, Linear)]
    selected: set[str] = set()
    problems = []
    for pattern in config.targets:
        matches = {name for name in layers if _is_match(name, pattern.removeprefix("!"))}
        if not matches:
            problems.append(_no_match_message(pattern, layers, [*model.heads], others))
        selected = selected - matches if pattern.startswith("!") else selected | matches
    models = [module for module in model.modules() if isinstance(module, ModelWithHeads)]
    if config.dropout and not all(own.runs_layers_on_rows for own in models):
        problems.append(
            f"lora.dropout={config.dropout:g} with model.type=deep_averaging and direction=bidirectional: "
            "its layers get whole documents, and no positions of rows. Set lora.dropout=0."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    if not selected:
        raise ConfigError(
            f"lora.targets={list(config.targets)} leaves no layer: patterns apply in order and a '!' "
            "removes, so begin with the layers to adapt, such as '*'."
        )
    adapted = []
    for name, layer in layers.items():
        if name in selected:
            parent, _, own_name = name.rpartition(".")
            adapted.append(LoraLinear(layer, config))
            setattr(model.get_submodule(parent), own_name, adapted[-1])
    model.adapter_keys = [layer.row_keys for layer in adapted] if config.dropout else []


def _linear_layers(model: ModelWithHeads) -> Iterator[tuple[str, Linear]]:
    heads = tuple(f"{name}." for name in model.heads)
    for name, module in model.named_modules():
        if type(module) is Linear and not f"{name}.".startswith(heads):
            yield name, module


def _is_match(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _no_match_message(
    pattern: str, layers: Iterable[str], heads: Sequence[str], others: Sequence[str]
) -> str:
    pattern = pattern.removeprefix("!")
    reason = ""
    if any(_is_match(name, pattern) for name in heads):
        reason = " A head trains in full: name it in trainable."
    elif any(_is_match(name, pattern) for name in others):
        reason = " Embeddings, norms, experts and recurrent layers have no adapters."
    # Layers that differ only in their block's number count as one.
    kinds = list(
        dict.fromkeys(".".join("*" if part.isdigit() else part for part in n.split(".")) for n in layers)
    )
    shown = ", ".join(kinds[:_MOST_LISTED]) + (", ..." if len(kinds) > _MOST_LISTED else "")
    return f"lora.targets: {pattern!r} matches no linear layer; there are {shown}.{reason}"
