"""Maps distft's parameters to transformers' tensors: names, shapes, and rows of joined tensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from distft.checkpoint.formats.huggingface_config import (
    Architecture,
    HeadKind,
    HuggingFaceModelSpec,
    KnownConfig,
)
from distft.checkpoint.formats.huggingface_encoders import (
    CLASSIFIER_LAYERS,
    ENCODERS,
    TIED_COPIES,
    encoder_layers,
    encoder_modules,
)
from distft.checkpoint.formats.huggingface_experts import (
    MODELS_WITH_EXPERTS,
    ExpertPiece,
    expert_modules,
    expert_pieces,
    is_fused,
    is_of_experts,
)
from distft.checkpoint.formats.huggingface_t5 import t5_copies, t5_name
from distft.checkpoint.formats.names import CONFIG_FILE
from distft.errors import ConfigError
from distft.model.encoder_decoder_config import EncoderDecoderConfig
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, Heads, HiddenLayer

LM_HEAD, LM_TRANSFORM = "lm_head.weight", "lm_head.dense"

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
_CHUNK_NUMEL = 1 << 22  # read at a time from a tensor that has to be read whole
_HEADS = {"lm_head": "lm_head", "classifier": "score"}
_CONV1D = frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"})  # weights are [in, out]


@dataclass(frozen=True, slots=True)
class HuggingFaceTensor:
    """A tensor of transformers: the rows of distft's `parameters`, concatenated and perhaps transposed."""

    name: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...]
    is_transposed: bool
    expert: int | None = None  # then it has this expert's weights alone, of the one parameter

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class ParameterLocation:
    """A distft parameter in a transformers tensor: rows from `first_row` on, once it is transposed back."""

    tensor: HuggingFaceTensor
    shape: tuple[int, ...]
    first_row: int
    # Of a parameter with the weights of all experts: the tensor and the first element of each
    experts: tuple[tuple[HuggingFaceTensor, int], ...] = ()

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def tensors(self) -> list[HuggingFaceTensor]:
        """All tensors that have elements of it."""
        return [tensor for tensor, _ in self.experts] or [self.tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorMap:
    """All tensors of a model under transformers' names, and all parameters under distft's."""

    tensors: dict[str, HuggingFaceTensor]
    parameters: dict[str, ParameterLocation]
    embedding_name: str  # of transformers; a tied head shares this tensor


def base_prefix(architecture: Architecture) -> str:
    """Prefix of transformers' names of all tensors but the head; models saved without a head lack it."""
    if architecture == "t5":
        return ""
    if architecture in ENCODERS and architecture != "modernbert":
        return f"{architecture}."
    return "transformer." if architecture == "gpt2" else "model."


def map_tensors(
    config: KnownConfig,
    architecture: Architecture,
    head: HeadKind,
    *,
    num_labels: int = 0,
    has_prefix: bool = True,
    fused: bool = False,
) -> TensorMap:
    """All tensors of a model, in the order of distft's parameters. `num_labels` is the classifier's.

    `fused`: the experts of a block are two tensors, and not those of each expert three. The head of a
    tied language model is not a tensor of its own.
    """
    groups: dict[str, list[str]] = {}
    layer = CLASSIFIER_LAYERS.get(architecture, "none")
    shapes = parameter_shapes(config, head, num_labels=num_labels, hidden=layer)
    prefix = base_prefix(architecture)
    tensors: dict[str, HuggingFaceTensor] = {}
    locations: dict[str, ParameterLocation] = {}
    for parameter, shape in shapes.items():
        if is_of_experts(parameter):
            block = f"{prefix if has_prefix else ''}layers.{parameter.split('.')[1]}"
            pieces = expert_pieces(parameter, shape, architecture, block, fused=fused)
            locations[parameter] = _locate_experts(parameter, shape, list(pieces), tensors)
            continue
        if isinstance(config, EncoderDecoderConfig):
            name = t5_name(parameter, config)
        else:
            name = huggingface_name(parameter, architecture, fused=fused)
        groups.setdefault(name if has_prefix else name.removeprefix(prefix), []).append(parameter)
    for name, parameters in groups.items():
        is_transposed = name.endswith(".weight") and _is_conv1d(name, architecture)
        num_rows = sum(shapes[parameter][0] for parameter in parameters)
        joined_shape = (num_rows, *shapes[parameters[0]][1:])
        shape = joined_shape[::-1] if is_transposed else joined_shape
        tensors[name] = HuggingFaceTensor(name, shape, tuple(parameters), is_transposed)
        row = 0
        for parameter in parameters:
            locations[parameter] = ParameterLocation(tensors[name], shapes[parameter], row)
            row += shapes[parameter][0]
    return TensorMap(
        tensors=tensors,
        parameters={parameter: locations[parameter] for parameter in shapes},
        embedding_name=locations["embed.weight"].tensor.name,
    )


def _locate_experts(
    parameter: str,
    shape: tuple[int, ...],
    pieces: Sequence[ExpertPiece],
    tensors: dict[str, HuggingFaceTensor],
) -> ParameterLocation:
    """Where the experts of a parameter are; adds their tensors to `tensors`."""
    own = []
    for expert, piece in enumerate(pieces):
        is_alone = piece.shape == shape[1:]
        found = tensors.get(piece.name)
        names = (parameter,) if found is None else tuple(dict.fromkeys((*found.parameters, parameter)))
        tensors[piece.name] = HuggingFaceTensor(
            piece.name, piece.shape, names, is_transposed=False, expert=expert if is_alone else None
        )
        own.append((tensors[piece.name], piece.offset))
    return ParameterLocation(own[0][0], shape, 0, tuple(own))


def map_saved_tensors(spec: HuggingFaceModelSpec, names: Iterable[str]) -> TensorMap:
    """The tensors of the model in a directory with tensors of these names.

    Models saved without a head have no prefix; nor has OpenAI's GPT-2.
    """
    prefix, names = base_prefix(spec.architecture), list(names)
    return map_tensors(
        spec.model,
        spec.architecture,
        spec.head,
        num_labels=len(spec.label_names or ()),
        has_prefix=any(name.startswith(prefix) for name in names),
        fused=is_fused(names),
    )


def tied_copies(spec: HuggingFaceModelSpec, tensor_map: TensorMap) -> dict[str, str]:
    """Tensors that a file may have as copies of others, and the names of those."""
    if spec.architecture == "t5":
        own = t5_copies(is_tied=spec.model.tie_embeddings)
        return dict.fromkeys(own, tensor_map.embedding_name)
    if not spec.model.tie_embeddings:
        return {}
    copies = TIED_COPIES.get(spec.architecture, {LM_HEAD: None})
    return {copy: original or tensor_map.embedding_name for copy, original in copies.items()}


def read_parameter(
    location: ParameterLocation, read_from: Callable[[str, int, int], Tensor], start: int, stop: int
) -> Tensor:
    """Elements [start, stop) of a parameter; `read_from` gives elements of the tensor with a name.

    A transposed tensor is read whole, `_CHUNK_NUMEL` elements at a time.
    """
    if location.experts:
        return _read_experts(location, read_from, start, stop)
    tensor = location.tensor
    read = partial(read_from, tensor.name)
    if not tensor.is_transposed:
        offset = location.first_row * (tensor.numel // tensor.shape[0])
        return read(offset + start, offset + stop)
    num_stored_rows, num_columns = tensor.shape
    first, last = start // num_stored_rows, -(-stop // num_stored_rows)  # rows: columns of the tensor
    parts = []
    chunk_rows = max(_CHUNK_NUMEL // num_columns, 1)
    for row in range(0, num_stored_rows, chunk_rows):
        end = min(row + chunk_rows, num_stored_rows)
        columns = read(row * num_columns, end * num_columns).view(end - row, num_columns).T
        parts.append(columns[location.first_row + first : location.first_row + last].contiguous())
    offset = first * num_stored_rows
    return torch.cat(parts, dim=1).view(-1)[start - offset : stop - offset]


def _read_experts(
    location: ParameterLocation, read_from: Callable[[str, int, int], Tensor], start: int, stop: int
) -> Tensor:
    numel = location.numel // len(location.experts)  # of an expert
    parts = [torch.empty(0)] if start == stop else []
    for expert in range(start // numel, -(-stop // numel)):
        tensor, offset = location.experts[expert]
        begin, end = max(start - expert * numel, 0), min(stop - expert * numel, numel)
        parts.append(read_from(tensor.name, offset + begin, offset + end))
    return torch.cat(parts)


def parameter_shapes(
    config: KnownConfig, head: HeadKind, *, num_labels: int = 0, hidden: HiddenLayer = "none"
) -> dict[str, tuple[int, ...]]:
    """Shapes of distft's parameters, tied ones once; without the head if `head` is `none`.

    `num_labels` and `hidden` are the classifier's.
    """
    heads: dict[HeadKind, Heads] = {
        "language_model": LANGUAGE_MODEL,
        "classifier": {"classifier": ClassificationHead(num_labels=max(num_labels, 1), hidden=hidden)},
        "none": {},
    }
    try:
        with torch.device("meta"):
            module = config.build(heads[head])
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{CONFIG_FILE} describes a model that torch cannot make: {reason}") from None
    return {name: tuple(param.shape) for name, param in module.named_parameters()}


def huggingface_name(parameter: str, architecture: Architecture, *, fused: bool = False) -> str:
    """Name of the transformers tensor that contains the parameter, which is not of experts."""
    modules = _modules(architecture)
    if architecture in MODELS_WITH_EXPERTS:
        modules = {**modules, **expert_modules(architecture, fused=fused)}
    module, _, kind = parameter.rpartition(".")
    if not module.startswith("blocks."):
        return f"{modules[module]}.{kind}"
    _, number, inner = module.split(".", 2)
    if architecture in ENCODERS:
        layers = encoder_layers(architecture)
    else:
        layers = base_prefix(architecture) + ("h" if architecture == "gpt2" else "layers")
    return f"{layers}.{number}.{modules[inner]}.{kind}"


def _modules(architecture: Architecture) -> Mapping[str, str]:
    if architecture in ENCODERS:
        return encoder_modules(architecture)
    return {**(_GPT2_MODULES if architecture == "gpt2" else _LLAMA_MODULES), **_HEADS}


def _is_conv1d(name: str, architecture: Architecture) -> bool:
    return architecture == "gpt2" and any(name.endswith(f".{module}.weight") for module in _CONV1D)
