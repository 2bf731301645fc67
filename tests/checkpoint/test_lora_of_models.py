"""Adapters in every type of model: which layers get one, and what is merged, written and read again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.huggingface_models import DISTFT_MODERNBERT, loaded, randomize, save_model
from torch import Tensor

from distft.checkpoint.adapters import merged
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.detect import open_source
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.formats.peft_target import write_peft
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.sources import CheckpointSource, StateSource, read_state
from distft.config import parse
from distft.engine.memory import allocate
from distft.engine.quantized_weights import quantizable_weights
from distft.errors import ConfigError
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, EmbeddingHead, Heads
from distft.model.lora import LoraLinear, add_adapters
from distft.model.lora_config import LoraConfig, is_adapter
from distft.model.settings import AnyModelConfig
from distft.model.with_heads import ModelWithHeads

TEXT: dict[str, Any] = {"vocab_size": 23, "max_seq_len": 12, "d_model": 12}
LAYERS: dict[str, Any] = {**TEXT, "num_layers": 2, "num_heads": 2, "d_ff": 20}
CLASSIFIER: Heads = {"classifier": ClassificationHead(num_labels=3, pooling="mean")}
VIT: dict[str, Any] = {
    "type": "vit",
    "image_size": 4,
    "num_channels": 1,
    "patch_size": 2,
    "d_model": 12,
    "num_layers": 1,
    "num_heads": 2,
}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "d_ff": 8, "shared_d_ff": 12, "shared_gate": True}
ATTENTION, GATED = "attn.q attn.k attn.v attn.o", "mlp.gate mlp.up mlp.down"


def _of(prefix: str, names: str) -> list[str]:
    return [f"{prefix}.{name}" for name in names.split()]


# Of each kind the model, its heads, and the layers that have an adapter by default.
KINDS: dict[str, tuple[dict[str, Any], Heads, list[str]]] = {
    "modernbert": (
        {**LAYERS, **DISTFT_MODERNBERT, "num_layers": 1},
        LANGUAGE_MODEL,
        [name for block in (0,) for name in _of(f"blocks.{block}", f"{ATTENTION} {GATED}")],
    ),
    "t5": (
        {
            **TEXT,
            "type": "encoder_decoder",
            "num_heads": 2,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "mlp": "geglu_tanh",
            "tie_embeddings": False,
        },
        LANGUAGE_MODEL,
        [
            *_of("encoder.blocks.0", f"{ATTENTION} {GATED}"),
            *_of("decoder.blocks.0", f"{ATTENTION} {GATED} cross.q cross.k cross.v cross.o"),
        ],
    ),
    "qwen2_moe": (
        {**LAYERS, "num_layers": 1, "qkv_bias": True, "experts": EXPERTS},
        LANGUAGE_MODEL,
        _of("blocks.0", f"{ATTENTION} mlp.shared.gate mlp.shared.up mlp.shared.down mlp.shared_gate"),
    ),
    "mixtral": (
        {**LAYERS, "num_layers": 1, "experts": {"num_experts": 4, "experts_per_token": 2}},
        LANGUAGE_MODEL,
        _of("blocks.0", ATTENTION),
    ),
    "vit": (
        VIT,
        CLASSIFIER,
        [*_of("blocks.0", f"{ATTENTION} mlp.up mlp.down"), "patch_embed.projection"],
    ),
    "clip": (
        {
            "type": "clip",
            "d_embedding": 8,
            "image": VIT,
            "text": {"type": "lstm", **TEXT, "num_layers": 1, "direction": "bidirectional"},
        },
        {"embedding": EmbeddingHead()},
        [
            *_of("image.blocks.0", f"{ATTENTION} mlp.up mlp.down"),
            "image.patch_embed.projection",
            "image_projection",
            "text_projection",
        ],
    ),
    "deep_averaging": (
        {"type": "deep_averaging", **TEXT, "num_layers": 2, "direction": "bidirectional"},
        CLASSIFIER,
        ["blocks.0", "blocks.1"],
    ),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "dora": {"rank": 3, "alpha": 5.0, "dora": True, "rslora": True},
}
PADDED = [12, 9, 5]


def _build(raw: dict[str, Any], heads: Heads, lora: LoraConfig | None = None) -> ModelWithHeads:
    """A model with random weights and adapters, small enough that fp32 rounds the outputs by 1e-7."""
    with torch.device("meta"):
        module = parse(AnyModelConfig, raw).build(heads)
        if lora is not None:
            add_adapters(module, lora)
    allocate(module, torch.device("cpu"), torch.float32)
    randomize(module)
    with torch.no_grad():
        for param in module.parameters():
            if param.ndim > 1:
                param.mul_(0.6)
    return module.eval()


def _outputs(module: ModelWithHeads) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    lengths, is_clip = torch.tensor(PADDED), "image_projection" in dict(module.named_modules())
    ids = torch.randint(1, 23, (3, 12), generator=generator)
    images = torch.randint(0, 256, (3, 1, 4, 4), generator=generator, dtype=torch.uint8)
    reads_images = is_clip or "patch_embed" in dict(module.named_modules())
    is_prefix = torch.arange(12)[None] < torch.tensor([[6], [4], [2]])
    with torch.no_grad():
        if reads_images and not is_clip:
            return module.logits(torch.zeros(3, 1, dtype=torch.int64), images=images)
        if is_clip:
            return module.logits(ids, lengths=lengths, images=images)
        found = module.logits(ids, lengths=lengths, is_prefix=is_prefix if _is_t5(module) else None)
    if found.ndim == 2:
        return found
    return found[torch.arange(12)[None] < lengths[:, None] - 1]  # nothing reads those of padding


def _is_t5(module: ModelWithHeads) -> bool:
    return module.config.is_encoder_decoder


def _saved(kind: str, variant: str, root: Path) -> tuple[CheckpointSource, Tensor]:
    """A checkpoint of a model with adapters, as a run saves it, and the model's outputs."""
    raw, heads, _ = KINDS[kind]
    lora = LoraConfig(**VARIANTS[variant])
    module = _build(raw, heads, lora)
    labels = ["a", "b", "c"] if "classifier" in heads else None
    source: Checkpoint = save_model(module, root, label_names=labels)  # type: ignore[arg-type]
    records = {
        name: record.model_copy(update={"trainable": is_adapter(name)})
        for name, record in source.manifest.parameters.items()
    }
    config = {**source.manifest.config, "lora": lora.model_dump(mode="json"), "model": raw}
    source.manifest = source.manifest.model_copy(update={"config": config, "parameters": records})
    return source, _outputs(module)


def _plain(kind: str, source: StateSource) -> ModelWithHeads:
    """The model without adapters, with the weights of `source`."""
    raw, heads, _ = KINDS[kind]
    module = _build(raw, heads)
    for name, param in module.named_parameters():
        read_state(source, name, WEIGHT, param.detach().view(-1), 0)
    return module


LSTM = {"type": "lstm", **TEXT, "num_layers": 1}


def _adapted(kind: str, lora: LoraConfig) -> list[str]:
    """Names of the layers with an adapter."""
    raw, heads, _ = KINDS.get(kind, (LSTM, LANGUAGE_MODEL, []))
    with torch.device("meta"):
        module = parse(AnyModelConfig, raw).build(heads)
        add_adapters(module, lora)
    return [name for name, layer in module.named_modules() if isinstance(layer, LoraLinear)]


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_all_linear_layers_but_heads_have_an_adapter(kind: str) -> None:
    assert sorted(_adapted(kind, LoraConfig(rank=2))) == sorted(KINDS[kind][2])


@pytest.mark.parametrize(
    ("kind", "targets", "expected"),
    [
        ("t5", ["q", "!encoder.*"], ["decoder.blocks.0.attn.q", "decoder.blocks.0.cross.q"]),
        ("t5", ["cross.*", "!cross.o"], _of("decoder.blocks.0.cross", "q k v")),
        ("qwen2_moe", ["shared.*"], _of("blocks.0.mlp.shared", "gate up down")),
        ("clip", ["image.*.q", "text_projection"], ["image.blocks.0.attn.q", "text_projection"]),
    ],
)
def test_patterns_select_layers_of_other_models(kind: str, targets: list[str], expected: list[str]) -> None:
    assert _adapted(kind, LoraConfig(rank=2, targets=tuple(targets))) == expected


@pytest.mark.parametrize(
    ("kind", "lora", "problem"),
    [
        ("qwen2_moe", {"targets": ("experts.*",)}, "'experts.*' matches no linear layer; there are blocks"),
        ("mixtral", {"targets": ("router",)}, "'router' matches no linear layer; there are blocks"),
        ("t5", {"targets": ("wi_0", "shared")}, "'wi_0' matches no .*\nlora.targets: 'shared' matches no"),
        ("lstm", {}, "the model has no linear layer beside its heads, so that nothing can have an adapter"),
        ("deep_averaging", {"dropout": 0.1}, "lora.dropout=0.1 with model.type=deep_averaging and direc"),
    ],
)
def test_what_can_have_no_adapter_is_refused(kind: str, lora: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        _adapted(kind, LoraConfig(rank=2, **lora))


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_weights_in_8_bits_are_those_of_all_adapted_layers_of_blocks(kind: str) -> None:
    raw, heads, layers = KINDS[kind]
    quantized = quantizable_weights(_build(raw, heads, LoraConfig(rank=2)))
    assert set(quantized) == {f"{name}.weight" for name in layers if "blocks." in name}


MERGES = [(kind, "dora") for kind in KINDS] + [("modernbert", "lora"), ("mixtral", "lora")]


@pytest.mark.parametrize(("kind", "variant"), MERGES)
def test_merged_weights_compute_what_the_adapters_do(kind: str, variant: str, tmp_path: Path) -> None:
    source, expected = _saved(kind, variant, tmp_path)
    before = _outputs(_plain(kind, source))
    assert float((before - expected).abs().max()) > 1e-3, "the adapters change the outputs"
    found = _outputs(_plain(kind, merged(source)))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


AUTO_CLASSES = {
    "modernbert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "qwen2_moe": "AutoModelForCausalLM",
    "mixtral": "AutoModelForCausalLM",
}


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers about one another, and of tiny vocabularies
@pytest.mark.parametrize(
    ("kind", "variant"), [("modernbert", "lora"), ("t5", "dora"), ("qwen2_moe", "dora"), ("mixtral", "lora")]
)
def test_an_export_has_the_adapters_merged_in_or_as_peft_has_them(
    kind: str, variant: str, tmp_path: Path
) -> None:
    """PEFT merges them itself, into the model without them; what was written is read again."""
    import peft

    source, expected = _saved(kind, variant, tmp_path / "own")
    write_huggingface(merged(source), str(tmp_path / "merged"))
    plain = save_model(_plain(kind, source), tmp_path / "plain")  # type: ignore[arg-type]
    write_huggingface(plain, str(tmp_path / "base"))
    write_peft(source, str(tmp_path / "adapter"), on_progress=lambda _: None)
    base = loaded(tmp_path / "base", AUTO_CLASSES[kind])
    model: Any = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "by_peft")
    config = tmp_path / "adapter/adapter_config.json"
    raw = {**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "base")}
    config.write_text(json.dumps(raw))
    for name in ("merged", "by_peft", "adapter"):
        found = _outputs(_plain(kind, merged(open_source(str(tmp_path / name)))))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6, msg=name)
