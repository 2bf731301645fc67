"""Parameter and FLOP counts against the real module and torch's FlopCounterMode."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distft.model.counts import forward_flops, num_parameters, recomputed_flops, training_flops
from distft.model.heads import (
    LANGUAGE_MODEL,
    ClassificationHead,
    EmbeddingHead,
    GeneratorHead,
    Heads,
    TokenHead,
)
from distft.model.transformer import Transformer
from distft.model.transformer_config import TransformerConfig

BOOLEANS = (
    "attention_bias",
    "qkv_bias",
    "mlp_bias",
    "norm_bias",
    "embedding_norm",
    "qk_norm",
    "tie_embeddings",
    "lm_head_transform",
    "lm_head_transform_bias",
)


@st.composite
def configs(draw: st.DrawFn) -> TransformerConfig:
    num_kv_heads = draw(st.integers(1, 3))
    positions: Literal["rotary", "learned"] = draw(st.sampled_from(["rotary", "learned"]))
    flags: dict[str, Any] = {name: draw(st.booleans()) for name in BOOLEANS}
    norm_position: Literal["pre", "post"] = draw(st.sampled_from(["pre", "post"]))
    return TransformerConfig(
        vocab_size=draw(st.integers(1, 40)),
        pad_vocab_to=draw(st.sampled_from([1, 16])),
        max_seq_len=16,
        d_model=draw(st.integers(1, 24)),
        num_layers=draw(st.integers(1, 3)),
        num_heads=num_kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        d_ff=draw(st.integers(1, 30)),
        norm=draw(st.sampled_from(["rmsnorm", "layernorm"])),
        norm_position=norm_position,
        first_attention_norm=norm_position == "post" or draw(st.booleans()),
        positions=positions,
        position_offset=draw(st.integers(0, 2)) if positions == "learned" else 0,
        num_segments=draw(st.integers(0, 2)),
        mlp=draw(st.sampled_from(["swiglu", "geglu", "gelu", "gelu_exact"])),
        attention=draw(st.sampled_from(["causal", "bidirectional"])),
        **flags,
    )


CLASSIFIER = {"classifier": ClassificationHead(num_labels=3)}
BERT_CLASSIFIER: Heads = {"classifier": ClassificationHead(num_labels=3, hidden="tanh")}
MODERNBERT_CLASSIFIER: Heads = {"classifier": ClassificationHead(num_labels=3, hidden="gelu_norm")}
MODULES = (
    "embed",
    "embed_norm",
    "segment_embed",
    "blocks.0",
    "blocks.0.mlp.down",
    "blocks.0.mlp_norm",
    "blocks.1",
    "blocks.2",
    "norm",
    "lm_head",
    "lm_head.dense",
    "lm_head.norm",
    "classifier",
    "classifier.hidden",
    "classifier.norm",
    "tokens",
)
GENERATOR_MODULES = tuple(f"generator.{name}" for name in ("input", "blocks.0", "blocks.1", "norm", "hidden"))
OTHERS: Heads = {
    "generator": GeneratorHead(num_layers=2, size=0.5),
    "tokens": TokenHead(num_outputs=2),
    "vector": EmbeddingHead(learns_temperature=True),
}
GENERATOR: Heads = {"generator": OTHERS["generator"]}
SEVERAL: Heads = {**LANGUAGE_MODEL, **BERT_CLASSIFIER, "tokens": TokenHead(num_outputs=2)}
BOTH: Heads = {**LANGUAGE_MODEL, **CLASSIFIER}
HEADS = st.sampled_from(
    [LANGUAGE_MODEL, CLASSIFIER, BERT_CLASSIFIER, MODERNBERT_CLASSIFIER, BOTH, SEVERAL, OTHERS, GENERATOR]
)


@settings(max_examples=20)
@given(configs(), HEADS)
def test_parameters_are_counted_exactly(config: TransformerConfig, heads: Heads) -> None:
    with torch.device("meta"):
        model = Transformer(config, heads)
    assert num_parameters(config, heads) == sum(param.numel() for param in model.parameters())


@settings(max_examples=8)
@given(configs(), HEADS, st.integers(1, 16))
def test_flops_of_the_forward_equal_those_that_torch_counts(
    config: TransformerConfig, heads: Heads, seq_len: int
) -> None:
    with torch.device("meta"):
        model = Transformer(config, heads)
    ids = torch.zeros(2, seq_len, dtype=torch.int64, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    expected = forward_flops(config, seq_len, heads).of(2 * seq_len, 2 * seq_len**2)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=20)
@given(
    configs(),
    HEADS,
    st.integers(1, 16),
    st.sets(st.sampled_from([*MODULES, *GENERATOR_MODULES])),
)
def test_flops_of_training_equal_those_that_torch_counts_whatever_is_frozen(
    config: TransformerConfig, heads: Heads, seq_len: int, modules: set[str]
) -> None:
    with torch.device("meta"):
        model = Transformer(config, heads)
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith(tuple(f"{module}." for module in modules)))
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    ids = torch.zeros(2, seq_len, dtype=torch.int64, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total = sum(output.sum() for output in model(ids).values())
        if total.requires_grad:
            total.backward()
    expected = training_flops(config, seq_len, heads, trainable).of(2 * seq_len, 2 * seq_len**2)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)
    if len(trainable) == len(list(model.parameters())):
        assert training_flops(config, seq_len, heads) == training_flops(config, seq_len, heads, trainable)


@pytest.mark.parametrize("norm_position", ["pre", "post"])
@pytest.mark.parametrize("module", ["embed", "blocks.0", "blocks.1", "blocks.2", "lm_head"])
def test_recomputed_flops_equal_those_that_torch_counts(
    module: str, norm_position: Literal["pre", "post"]
) -> None:
    config = TransformerConfig(
        vocab_size=11,
        max_seq_len=8,
        d_model=8,
        num_layers=3,
        num_heads=2,
        d_ff=12,
        tie_embeddings=False,
        norm_position=norm_position,
    )
    with torch.device("meta"):
        model = Transformer(config)
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith(f"{module}."))
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    totals = []
    for mode in ("none", "full"):
        model.set_activation_checkpointing(mode)
        ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.logits(ids).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[1] - totals[0] == recomputed_flops(config, trainable).of(2 * 5, 2 * 5**2)


def test_llama_3_70b_has_its_published_size() -> None:
    config = TransformerConfig(
        vocab_size=128_256,
        max_seq_len=8192,
        d_model=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        d_ff=28_672,
        tie_embeddings=False,
    )
    assert num_parameters(config) == 70_553_706_496
