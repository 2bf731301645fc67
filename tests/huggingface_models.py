"""Small models of transformers with random weights, and the same models as ours."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.manifest import Progress, TokenizerRecord
from distft.checkpoint.sources import StateSource, read_state
from distft.checkpoint.store import CheckpointStore, Draft, ParameterInfo, RunRecord
from distft.collectives import SingleProcess
from distft.engine.memory import allocate
from distft.model.config import ModelConfig
from distft.model.head import ClassificationHead, Head
from distft.model.transformer import Transformer
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
# model_type and what differs from the above
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
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
    "gpt2": ("gpt2", {}),
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False, "n_inner": None}),
}


def make_theirs(kind: str, auto_class: str = "AutoModelForCausalLM", **changes: Any) -> Any:
    """A model of transformers with every number random: norms and biases too."""
    import transformers

    model_type, options = THEIRS[kind]
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
            param.copy_(values + 1 if "norm" in name or ".ln_" in name else values)


def random_ids() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (3, MAX_SEQ_LEN), generator=torch.Generator().manual_seed(5))


def filled(config: ModelConfig, source: StateSource, head: Head | None = None) -> Transformer:
    """Our model, filled as an engine fills it."""
    with torch.device("meta"):
        module = Transformer(config, head)
    allocate(module, torch.device("cpu"), torch.float32)
    for name, param in module.named_parameters():
        read_state(source, name, WEIGHT, param.detach().view(-1), 0)
    return module.eval()


def from_theirs(path: Path | str) -> tuple[HuggingFaceCheckpoint, Transformer]:
    source = HuggingFaceCheckpoint.open(str(path))
    config = ModelConfig.model_validate(source.manifest.config["model"])
    labels = source.manifest.label_names
    return source, filled(
        config, source, None if labels is None else ClassificationHead(num_labels=len(labels))
    )


def make_ours(config: ModelConfig, head: Head | None = None) -> Transformer:
    with torch.device("meta"):
        module = Transformer(config, head)
    allocate(module, torch.device("cpu"), torch.float32)
    randomize(module)
    return module.eval()


def save_ours(
    module: Transformer,
    root: Path,
    *,
    label_names: list[str] | None = None,
    pooling: str = "last",
    tokenizer: Tokenizer | None = None,
    change: Callable[[Tensor], Tensor] = lambda values: values,
) -> Checkpoint:
    """A checkpoint of ours that holds `module`; `change` is made to the weights that are saved."""
    params = dict(module.named_parameters())
    config: dict[str, Any] = {"model": module.config.model_dump(mode="json")}
    if isinstance(module.head, ClassificationHead):
        config["objective"] = {"type": "classification", "pooling": pooling}
    draft = Draft(
        progress=Progress(step=1),
        fragments=[Fragment(n, WEIGHT, 0, change(p.detach().reshape(-1))) for n, p in params.items()],
        parameters={n: ParameterInfo(tuple(p.shape), True, 1) for n, p in params.items()},
        record=RunRecord(
            run_id="test",
            config=config,
            label_names=label_names,
            tokenizer=tokenizer
            and TokenizerRecord(fingerprint=tokenizer.fingerprint, file="tokenizer.model"),
            written_by={},
            groups=[],
            tied={},
            probe=None,
        ),
        attachments={"tokenizer.model": tokenizer.to_bytes()} if tokenizer else {},
    )
    return Checkpoint.open(CheckpointStore(str(root), SingleProcess()).save(draft))


def weights(source: StateSource, names: list[str]) -> dict[str, Tensor]:
    """Whole parameters, in their shapes."""
    whole = {}
    for name in names:
        shape = source.shape(name)
        assert shape is not None
        whole[name] = source.read(name, WEIGHT, 0, torch.Size(shape).numel()).view(shape)
    return whole
