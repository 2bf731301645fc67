"""Parameter and FLOP counts of mixtures of experts against the module and torch's FlopCounterMode."""

from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distft.model.counts import num_active_parameters, num_parameters, recomputed_flops, training_flops
from distft.model.experts_config import ExpertsConfig
from distft.model.grouped_product import grouped_product
from distft.model.transformer import Transformer
from distft.model.transformer_config import TransformerConfig

NUM_ROWS, SEQ_LEN = 2, 5
MODULES = (
    "embed",
    "blocks.0",
    "blocks.0.attn",
    "blocks.0.mlp.router",
    "blocks.1",
    "blocks.1.mlp.router",
    "blocks.1.mlp.experts.gate",
    "blocks.1.mlp.experts.up",
    "blocks.1.mlp.experts.down",
    "blocks.1.mlp.shared",
    "blocks.1.mlp.shared_gate",
    "blocks.1.mlp_norm",
    "norm",
)


def _forward_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * x[0] * x[1] * weight[1])


def _backward_flops(gradient: Any, x: Any, weight: Any, _ends: Any, needs: list[bool], **__: Any) -> int:  # noqa: ARG001
    return _forward_flops(x, weight) * sum(needs)


FORMULAS = {
    torch.ops.distft.grouped_product: _forward_flops,
    torch.ops.distft.grouped_product_gradients: _backward_flops,
}


@st.composite
def configs(draw: st.DrawFn) -> TransformerConfig:
    shared_d_ff = draw(st.sampled_from([0, 9]))
    chosen = draw(st.integers(1, 3))
    mlp: Literal["swiglu", "gelu"] = draw(st.sampled_from(["swiglu", "gelu"]))
    norm_position: Literal["pre", "post"] = draw(st.sampled_from(["pre", "post"]))
    experts = ExpertsConfig(
        num_experts=draw(st.integers(3, 5)),
        experts_per_token=chosen,
        d_ff=draw(st.sampled_from([None, 7])),
        shared_d_ff=shared_d_ff,
        shared_gate=shared_d_ff > 0 and draw(st.booleans()),
        normalize_weights=chosen > 1,
        every=draw(st.integers(1, 2)),
        bias_update_rate=draw(st.sampled_from([None, 0.1])),
    )
    return TransformerConfig(
        vocab_size=11,
        max_seq_len=8,
        d_model=6,
        num_layers=2,
        num_heads=2,
        head_dim=4,
        d_ff=12,
        mlp=mlp,
        norm_position=norm_position,
        experts=experts,
    )


ALONE = [{"blocks.1.mlp.shared"}, {"blocks.1.mlp.shared_gate"}, {"blocks.1.mlp.shared", "norm"}]


@settings(max_examples=30)
@given(configs(), st.sets(st.sampled_from(MODULES)) | st.sampled_from(ALONE))
def test_counts_equal_those_of_the_module_whatever_is_frozen(
    config: TransformerConfig, modules: set[str]
) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    assert num_parameters(config) == sum(param.numel() for param in model.parameters())
    for name, param in model.named_parameters():
        is_trainable = name.startswith(tuple(f"{module}." for module in modules))
        param.requires_grad_(is_trainable and "selection_bias" not in name)
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    totals = []
    modes: tuple[Literal["none", "full"], ...] = ("none", "full")
    for mode in modes:
        model.set_activation_checkpointing(mode)
        ids = torch.zeros(NUM_ROWS, SEQ_LEN, dtype=torch.int64, device="meta")
        counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        with sdpa_kernel(SDPBackend.MATH), counter:
            logits = model.logits(ids)
            if logits.requires_grad:
                torch.autograd.backward(logits.sum())
        totals.append(counter.get_total_flops())
    sizes = NUM_ROWS * SEQ_LEN, NUM_ROWS * SEQ_LEN**2
    assert totals[0] == pytest.approx(training_flops(config, SEQ_LEN, trainable=trainable).of(*sizes))
    assert totals[1] - totals[0] == pytest.approx(recomputed_flops(config, trainable).of(*sizes))


def test_the_formulas_are_those_of_the_product() -> None:
    x, weight = torch.zeros(7, 3), torch.zeros(4, 2, 3)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with counter:
        grouped_product(x, weight, torch.tensor([0, 5, 5, 7], dtype=torch.int32))
    assert counter.get_total_flops() == 2 * 7 * 3 * 2


def test_mixtral_8x7b_has_its_published_sizes() -> None:
    config = TransformerConfig(
        vocab_size=32_000,
        max_seq_len=4096,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        d_ff=14_336,
        tie_embeddings=False,
        experts=ExpertsConfig(num_experts=8, experts_per_token=2),
    )
    assert num_parameters(config) == 46_702_792_704
    assert num_active_parameters(config) == 12_879_925_248


def test_a_dense_model_is_active_as_a_whole() -> None:
    config = TransformerConfig(vocab_size=11, max_seq_len=8, d_model=8, num_layers=1, num_heads=2)
    assert num_active_parameters(config) == num_parameters(config)
