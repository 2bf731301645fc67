"""Mixtral, Qwen2-MoE and Qwen3-MoE of transformers: their config.json, and where the experts' tensors are.

Published files have a tensor for each expert. transformers 5 can also save those of all experts as one.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distft.checkpoint.formats.huggingface_decoders import (
    decoder_options,
    llama_keys,
    llama_problems,
    llama_sizes,
)
from distft.checkpoint.formats.huggingface_keys import ExpertKeys
from distft.model.transformer_config import TransformerConfig

# Each with the architecture whose attention it has.
MODELS_WITH_EXPERTS: Mapping[str, str] = {"mixtral": "mistral", "qwen3_moe": "qwen3", "qwen2_moe": "qwen2"}
_FUSED = ".experts.gate_up_proj"
_REMEDIES: Mapping[str, str] = {
    "bias_update_rate": " The router chooses by a bias, which no such model of transformers has here: "
    "train on without it (init_from with model.experts.bias_update_rate=null and "
    "allow_model_changes=[experts]), and export that; or convert to deepspeed or universal, which keep it."
}
_MATRICES = {  # distft's names, transformers', and Mixtral's
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3"),
    "down": ("down_proj", "w2"),
}


def expert_modules(architecture: str, *, fused: bool) -> dict[str, str]:
    """transformers' names of the modules in a block, beside those of a dense model and the experts."""
    return {
        "mlp.router": f"{_mlp(architecture, fused=fused)}.gate",
        "mlp.shared.gate": "mlp.shared_expert.gate_proj",
        "mlp.shared.up": "mlp.shared_expert.up_proj",
        "mlp.shared.down": "mlp.shared_expert.down_proj",
        "mlp.shared_gate": "mlp.shared_expert_gate",
    }


def _mlp(architecture: str, *, fused: bool) -> str:
    return "block_sparse_moe" if architecture == "mixtral" and not fused else "mlp"


def is_fused(names: Collection[str]) -> bool:
    """Whether tensors of these names are those of all experts at once."""
    return any(name.endswith(_FUSED) for name in names)


@dataclass(frozen=True, slots=True)
class ExpertPiece:
    """Where the weights of one expert lie: in the tensor `name` from element `offset` on."""

    name: str
    shape: tuple[int, ...]  # of the tensor
    offset: int


def expert_pieces(
    parameter: str, shape: tuple[int, ...], architecture: str, layer: str, *, fused: bool
) -> Iterator[ExpertPiece]:
    """Of each expert in a stacked parameter; `layer` is transformers' name of its block."""
    num_experts, num_rows, num_columns = shape
    matrix = parameter.split(".")[-2]
    experts = f"{layer}.{_mlp(architecture, fused=fused)}.experts"
    numel = num_rows * num_columns
    for expert in range(num_experts):
        if not fused:
            name = _MATRICES[matrix][architecture == "mixtral"]
            yield ExpertPiece(f"{experts}.{expert}.{name}.weight", (num_rows, num_columns), 0)
        elif matrix == "down":
            yield ExpertPiece(f"{experts}.down_proj", shape, expert * numel)
        else:
            joined = (num_experts, 2 * num_rows, num_columns)
            yield ExpertPiece(f"{experts}.gate_up_proj", joined, (2 * expert + (matrix == "up")) * numel)


def is_of_experts(parameter: str) -> bool:
    """Whether it has the weights of all experts of a block."""
    return ".mlp.experts." in parameter


def expert_sizes(keys: ExpertKeys, architecture: str) -> dict[str, Any]:
    """Fields of `TransformerConfig`."""
    is_mixtral, chosen = architecture == "mixtral", keys.num_experts_per_tok
    experts: dict[str, Any] = {
        "num_experts": keys.num_local_experts if keys.num_local_experts is not None else keys.num_experts,
        "experts_per_token": chosen,
        "normalize_weights": is_mixtral or keys.norm_topk_prob,
        "load_balance_weight": keys.router_aux_loss_coef * chosen,  # transformers' loss is K when balanced
    }
    if not is_mixtral:
        experts |= {
            "d_ff": keys.moe_intermediate_size,
            "every": keys.decoder_sparse_step,
            "dense_layers": keys.mlp_only_layers or (),
        }
    if architecture == "qwen2_moe":
        experts |= {"shared_d_ff": keys.shared_expert_intermediate_size, "shared_gate": True}
    sizes = llama_sizes(keys, MODELS_WITH_EXPERTS[architecture])
    if architecture == "qwen2_moe":
        sizes["qkv_bias"] = keys.qkv_bias
    return {**sizes, "experts": experts}


def expert_problems(keys: ExpertKeys, architecture: str) -> list[str]:
    problems = llama_problems(keys)
    if architecture != "mixtral" and keys.use_sliding_window:
        problems.append("use_sliding_window=true is not supported in a model with experts: it must be false.")
    if keys.router_jitter_noise:
        problems.append(
            f"router_jitter_noise={keys.router_jitter_noise} is not supported. It affects training only: set "
            "it to 0 in a copy of the file."
        )
    return problems


def expert_options(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The values of settings that a model of this architecture must have, those of its experts aside."""
    required = decoder_options(config, MODELS_WITH_EXPERTS[architecture])
    if architecture != "mixtral":
        required["sliding_window"] = None
    if architecture == "qwen2_moe":
        del required["qkv_bias"]
    return required


def unsupported_experts(config: TransformerConfig, architecture: str) -> Iterator[str]:
    """Settings of experts that the architecture does not have, each with the value that it needs."""
    experts = config.experts
    if architecture not in MODELS_WITH_EXPERTS:
        if experts is not None:
            yield "model.experts would have to be null."
        return
    if experts is None:
        yield "model.experts would have to be set."
        return
    required: dict[str, Any] = {"scores": "softmax", "bias_update_rate": None}
    if architecture == "mixtral":
        required |= {"normalize_weights": True, "every": 1, "dense_layers": ()}
    if architecture == "qwen2_moe":
        required["shared_gate"] = True
    else:
        required["shared_d_ff"] = 0
    for name, value in required.items():
        found = getattr(experts, name)
        if found != value:
            wanted = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            yield f"model.experts.{name}={found} would have to be {wanted}.{_REMEDIES.get(name, '')}"


def expert_keys(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """Keys of config.json."""
    experts = config.experts
    assert experts is not None
    d_ff, num_experts = experts.d_ff or config.d_ff, experts.num_experts
    keys = llama_keys(config, MODELS_WITH_EXPERTS[architecture]) | {
        "num_experts_per_tok": experts.experts_per_token,
        "router_aux_loss_coef": experts.load_balance_weight / experts.experts_per_token,
        "output_router_logits": False,
    }
    if architecture == "mixtral":
        return keys | {
            "num_local_experts": num_experts,
            "intermediate_size": d_ff,
            "router_jitter_noise": 0.0,
        }
    keys |= {
        "num_experts": num_experts,
        "moe_intermediate_size": d_ff,
        "norm_topk_prob": experts.normalize_weights,
        "decoder_sparse_step": experts.every,
        "mlp_only_layers": list(experts.dense_layers),
    }
    if architecture == "qwen2_moe":
        keys |= {"shared_expert_intermediate_size": experts.shared_d_ff, "qkv_bias": config.has_qkv_bias}
    return keys
