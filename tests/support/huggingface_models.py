"""Small random models of transformers and of distft, and conversions between files and modules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.manifest import Progress, TokenizerRecord
from distft.checkpoint.snapshot import CheckpointSnapshot, ParameterInfo, RunMetadata
from distft.checkpoint.sources import StateSource, read_state
from distft.checkpoint.store import CheckpointStore
from distft.collectives import SingleProcess
from distft.engine.memory import allocate
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, Heads
from distft.model.transformer import Transformer
from distft.model.transformer_config import TransformerConfig
from distft.tokenizer import Tokenizer

VOCAB_SIZE, MAX_SEQ_LEN = 53, 20
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 29,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_SEQ_LEN,
    "rms_norm_eps": 1e-3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 3,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_positions": MAX_SEQ_LEN,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 37,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": None,
    "eos_token_id": 3,
}
# model_type, and options that differ from LLAMA or GPT2; the widths of experts are multiples of 4, which the
# product of transformers needs
MODERNBERT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_SEQ_LEN,
    "local_attention": 6,
    "norm_eps": 1e-3,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 700.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    },
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
}
HF_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama_theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 57.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_wide": ("mistral", {"sliding_window": MAX_SEQ_LEN, "num_attention_heads": 3, "head_dim": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 10}),
    "qwen3_biases": ("qwen3", {"head_dim": 4, "attention_bias": True, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None, "intermediate_size": 28}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
        },
    ),
    "qwen2_moe_every": (
        "qwen2_moe",
        {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 10},
    ),
    "gpt2": ("gpt2", {}),
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": None}),
}
DISTFT_GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "positions": "learned",
    "mlp": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
}
# model_type, and options of `TransformerConfig`
DISTFT_MODERNBERT: dict[str, Any] = {
    "attention": "bidirectional",
    "norm": "layernorm",
    "norm_bias": False,
    "embedding_norm": True,
    "first_attention_norm": False,
    "mlp": "geglu",
    "num_layers": 4,
    "lm_head_transform": True,
    "lm_head_transform_bias": False,
    "sliding_window": 7,
    "global_attention_every": 3,
    "local_rope_theta": 40.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
}
DISTFT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_untied": ("llama", {"tie_embeddings": False, "num_kv_heads": 2, "norm_eps": 1e-3}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama_padded": ("llama", {"pad_vocab_to": 8, "rope_theta": 57.0, "qkv_bias": False}),
    "qwen2": ("qwen2", {"qkv_bias": True, "num_heads": 3, "num_kv_heads": 1, "head_dim": 6}),
    "qwen3": ("qwen3", {"qk_norm": True, "num_kv_heads": 2, "head_dim": 10, "tie_embeddings": False}),
    "qwen3_biases": ("qwen3", {"qk_norm": True, "attention_bias": True, "qkv_bias": True}),
    "mixtral": ("mixtral", {"d_ff": 28, "experts": {"num_experts": 4, "experts_per_token": 2}}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "qkv_bias": True,
            "experts": {
                "num_experts": 5,
                "experts_per_token": 3,
                "d_ff": 12,
                "shared_d_ff": 13,
                "shared_gate": True,
                "normalize_weights": False,
            },
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "qk_norm": True,
            "experts": {"num_experts": 4, "experts_per_token": 2, "d_ff": 12, "dense_layers": [0]},
        },
    ),
    "gpt2": ("gpt2", {**DISTFT_GPT2, "d_ff": 37}),
    "gpt2_untied": ("gpt2", {**DISTFT_GPT2, "tie_embeddings": False, "pad_vocab_to": 8, "dropout": 0.1}),
}


def make_hf_model(kind: str, auto_class: str = "AutoModelForCausalLM", **changes: Any) -> Any:
    """A model of transformers with random weights, norms and biases included."""
    import transformers

    model_type, options = HF_MODELS[kind]
    sizes = GPT2 if model_type == "gpt2" else LLAMA
    if model_type == "mistral" and options.get("num_attention_heads") == 3:
        sizes = {**sizes, "num_key_value_heads": 1}
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **options, **changes})
    model = getattr(transformers, auto_class).from_config(config)
    randomize(model)
    return model.eval()


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, param in model.named_parameters():
            values = torch.randn(param.shape, generator=generator) * 0.2
            param.copy_(values + 1 if "norm" in name.lower() or ".ln_" in name else values)


def model_config(**changes: Any) -> TransformerConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "max_seq_len": MAX_SEQ_LEN, "d_model": 24, "num_layers": 2}
    return TransformerConfig.model_validate({**sizes, "num_heads": 4, "d_ff": 29, **changes})


def loaded(target: Path, auto_class: str = "AutoModelForCausalLM") -> Any:
    """Load the model with transformers, which must report no missing, unexpected or mismatched tensors."""
    import transformers

    model, problems = getattr(transformers, auto_class).from_pretrained(target, output_loading_info=True)
    assert not any(problems.values()), problems
    return model.eval()


def random_ids() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (3, MAX_SEQ_LEN), generator=torch.Generator().manual_seed(5))


def build_model(config: TransformerConfig, source: StateSource, heads: Heads = LANGUAGE_MODEL) -> Transformer:
    """A distft model with the source's weights, loaded as an engine loads them."""
    with torch.device("meta"):
        module = Transformer(config, heads)
    allocate(module, torch.device("cpu"), torch.float32)
    for name, param in module.named_parameters():
        read_state(source, name, WEIGHT, param.detach().view(-1), 0)
    return module.eval()


def load_from_hf(path: Path | str) -> tuple[HuggingFaceCheckpoint, Transformer]:
    """Open a model directory of transformers, and build the distft model with its weights."""
    source = HuggingFaceCheckpoint.open(str(path))
    config = TransformerConfig.model_validate(source.manifest.config["model"])
    labels, objective = source.manifest.label_names, source.manifest.config.get("objective", {})
    if labels is None:
        return source, build_model(config, source)
    options = {name: objective[name] for name in ("pooling", "hidden") if name in objective}
    head = ClassificationHead(num_labels=len(labels), **options)
    return source, build_model(config, source, {"classifier": head})


def make_distft_model(config: TransformerConfig, heads: Heads = LANGUAGE_MODEL) -> Transformer:
    """A distft model with random weights."""
    with torch.device("meta"):
        module = Transformer(config, heads)
    allocate(module, torch.device("cpu"), torch.float32)
    randomize(module)
    return module.eval()


def save_model(
    module: Transformer,
    root: Path,
    *,
    label_names: list[str] | None = None,
    pooling: str = "last",
    tokenizer: Tokenizer | None = None,
    objective: dict[str, Any] | None = None,
    change: Callable[[Tensor], Tensor] = lambda values: values,
) -> Checkpoint:
    """Save `module` as a distft checkpoint; `change` is applied to each weight before."""
    params = dict(module.named_parameters())
    config: dict[str, Any] = {"model": module.config.model_dump(mode="json")}
    if objective is not None:
        config["objective"] = objective
    elif "classifier" in module.heads:
        head = module.heads["classifier"]
        assert isinstance(head, ClassificationHead)
        config["objective"] = {"type": "classification", "pooling": pooling, "hidden": head.hidden}
    snapshot = CheckpointSnapshot(
        progress=Progress(step=1),
        fragments=[Fragment(n, WEIGHT, 0, change(p.detach().reshape(-1))) for n, p in params.items()],
        parameters={n: ParameterInfo(tuple(p.shape), True, 1) for n, p in params.items()},
        metadata=RunMetadata(
            run_id="test",
            config=config,
            label_names=label_names,
            tokenizer=tokenizer
            and TokenizerRecord(fingerprint=tokenizer.fingerprint, file="tokenizer.model"),
            written_by={},
        ),
        attachments={"tokenizer.model": tokenizer.to_bytes()} if tokenizer else {},
    )
    return Checkpoint.open(CheckpointStore(str(root), SingleProcess()).save(snapshot))


def weights(source: StateSource, names: list[str]) -> dict[str, Tensor]:
    """The weights of whole parameters, in their shapes."""
    found = {}
    for name in names:
        shape = source.shape(name)
        assert shape is not None
        found[name] = source.read(name, WEIGHT, 0, torch.Size(shape).numel()).view(shape)
    return found
