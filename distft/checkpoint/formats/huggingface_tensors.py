"""Which tensor of transformers is made of which parameters of ours, and where each of ours lies in theirs."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from distft.checkpoint.formats.huggingface_shape import Architecture, HeadKind
from distft.model.config import ModelConfig
from distft.model.head import ClassificationHead, Head, LanguageModelHead
from distft.model.transformer import Transformer

_LLAMA_MODULES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_GPT2_MODULES = {
    "embed": "transformer.wte",
    "position_embed": "transformer.wpe",
    "norm": "transformer.ln_f",
    "attn_norm": "ln_1",
    "attn.q": "attn.c_attn",
    "attn.k": "attn.c_attn",
    "attn.v": "attn.c_attn",
    "attn.o": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_HEADS = {"lm_head": "lm_head", "classifier": "score"}
_CONV1D = frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"})  # weights are [in, out]


@dataclass(frozen=True, slots=True)
class TheirTensor:
    """`parameters` of ours one below the other, then transposed where it says so."""

    name: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    is_transposed: bool

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a parameter of ours lies: from row `row` on of a tensor of theirs, once that is turned back."""

    tensor: TheirTensor
    shape: tuple[int, ...]
    row: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMap:
    """A model's tensors on both sides."""

    theirs: dict[str, TheirTensor]
    ours: dict[str, Slot]
    embedding: str  # their name of the embedding, which a tied head shares


def base_prefix(architecture: Architecture) -> str:
    """What their names of all but the head begin with, except in a file of the model without a head."""
    return "transformer." if architecture == "gpt2" else "model."


def map_tensors(
    config: ModelConfig,
    architecture: Architecture,
    head: HeadKind,
    *,
    num_labels: int = 0,
    has_prefix: bool = True,
) -> TensorMap:
    """All tensors of a model, in our order. `num_labels` counts where the head is a classifier.

    A tied language model's head is no tensor of its own.
    """
    groups: dict[str, list[str]] = {}
    shapes = our_shapes(config, head, num_labels=num_labels)
    prefix = base_prefix(architecture)
    for parameter in shapes:
        name = their_name(parameter, architecture)
        groups.setdefault(name if has_prefix else name.removeprefix(prefix), []).append(parameter)
    theirs, ours = {}, {}
    for name, parameters in groups.items():
        is_transposed = name.endswith(".weight") and _is_conv1d(name, architecture)
        num_rows = sum(shapes[parameter][0] for parameter in parameters)
        joined = (num_rows, *shapes[parameters[0]][1:])
        shape = joined[::-1] if is_transposed else joined
        theirs[name] = TheirTensor(name, shape, tuple(parameters), is_transposed)
        row = 0
        for parameter in parameters:
            ours[parameter] = Slot(theirs[name], shapes[parameter], row)
            row += shapes[parameter][0]
    ours = {parameter: ours[parameter] for parameter in shapes}
    return TensorMap(theirs=theirs, ours=ours, embedding=ours["embed.weight"].tensor.name)


def our_shapes(config: ModelConfig, head: HeadKind, *, num_labels: int = 0) -> dict[str, tuple[int, ...]]:
    """Our parameters with their shapes, ties counted once; without a head where that is `none`."""
    end: Head = (
        LanguageModelHead() if head == "language_model" else ClassificationHead(num_labels=max(num_labels, 1))
    )
    with torch.device("meta"):
        module = Transformer(config, end)
    shapes: Mapping[str, tuple[int, ...]] = {n: tuple(p.shape) for n, p in module.named_parameters()}
    return {name: shape for name, shape in shapes.items() if head != "none" or name != "classifier.weight"}


def their_name(parameter: str, architecture: Architecture) -> str:
    """The tensor of transformers that our parameter is, or is a part of."""
    modules = {**(_GPT2_MODULES if architecture == "gpt2" else _LLAMA_MODULES), **_HEADS}
    module, _, kind = parameter.rpartition(".")
    if not module.startswith("blocks."):
        return f"{modules[module]}.{kind}"
    _, number, inner = module.split(".", 2)
    layers = "h" if architecture == "gpt2" else "layers"
    return f"{base_prefix(architecture)}{layers}.{number}.{modules[inner]}.{kind}"


def _is_conv1d(name: str, architecture: Architecture) -> bool:
    return architecture == "gpt2" and any(name.endswith(f".{module}.weight") for module in _CONV1D)
