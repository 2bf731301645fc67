"""Adapters beside linear layers: equal to PEFT's, and put where the patterns say."""

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from distft.errors import ConfigError
from distft.keyed_random import row_keys
from distft.model.config import ModelConfig
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, Heads
from distft.model.layers import Linear
from distft.model.lora import LoraLinear, add_adapters
from distft.model.lora_config import LoraConfig
from distft.model.transformer_config import TransformerConfig
from distft.model.with_heads import ModelWithHeads

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "both": {"rslora": True, "dora": True},
}
TINY = TransformerConfig(vocab_size=11, max_seq_len=8, d_model=8, num_layers=2, num_heads=2, d_ff=12)


def _layer(*, bias: bool, **settings: Any) -> LoraLinear:
    with torch.device("meta"):
        layer = LoraLinear(Linear(7, 5, bias=bias), LoraConfig(rank=3, alpha=4, **settings))
    layer = layer.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return layer


def _peft_layer(layer: LoraLinear, settings: dict[str, Any]) -> Any:
    """PEFT's layer with the same weights."""
    base = nn.Sequential(nn.Linear(7, 5, bias=layer.bias is not None))
    config = PeftConfig(
        r=3,
        lora_alpha=4,
        target_modules=["0"],
        use_rslora=settings.get("rslora", False),
        use_dora=settings.get("dora", False),
    )
    model = get_peft_model(base, config)
    found: Any = model.base_model.model[0]
    with torch.no_grad():
        found.base_layer.weight.copy_(layer.weight)
        if layer.bias is not None:
            found.base_layer.bias.copy_(layer.bias)
        found.lora_A.default.weight.copy_(layer.lora_a)
        found.lora_B.default.weight.copy_(layer.lora_b)
        if layer.lora_magnitude is not None:
            found.lora_magnitude_vector.default.weight.copy_(layer.lora_magnitude)
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_peft(kind: str, bias: bool) -> None:
    layer = _layer(bias=bias, **KINDS[kind])
    peft = _peft_layer(layer, KINDS[kind])
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(2))
    own_x, peft_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(own_x), peft(peft_x)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)
    for output in (y, expected):
        output.square().sum().backward()
    pairs = [
        (own_x.grad, peft_x.grad),
        (layer.lora_a.grad, peft.lora_A.default.weight.grad),
        (layer.lora_b.grad, peft.lora_B.default.weight.grad),
    ]
    if layer.lora_magnitude is not None:
        pairs.append((layer.lora_magnitude.grad, peft.lora_magnitude_vector.default.weight.grad))
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_row_of_zeros_has_a_finite_output() -> None:
    layer = _layer(bias=False, dora=True)
    with torch.no_grad():
        layer.weight[0], layer.lora_b[0] = 0, 0
        assert layer.lora_magnitude is not None
        layer.lora_magnitude[0] = 0
    assert layer(torch.ones(1, 7))[0, 0] == 0


def _model(config: ModelConfig, lora: LoraConfig, heads: Heads = LANGUAGE_MODEL) -> ModelWithHeads:
    with torch.device("meta"):
        model = config.build(heads)
        add_adapters(model, lora)
    return model


def _adapted(model: ModelWithHeads) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, LoraLinear)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["*"], "attn.q attn.k attn.v attn.o mlp.gate mlp.up mlp.down"),
        (["q", "v"], "attn.q attn.v"),
        (["attn.*", "!k"], "attn.q attn.v attn.o"),
        (["blocks.*.mlp.up"], "mlp.up"),
    ],
)
def test_patterns_select_linear_layers(targets: list[str], expected: str) -> None:
    heads = {**LANGUAGE_MODEL, "classifier": ClassificationHead(num_labels=2, hidden="tanh")}
    model = _model(TINY, LoraConfig(rank=2, targets=tuple(targets)), heads)
    assert _adapted(model) == [f"blocks.{index}.{name}" for index in (0, 1) for name in expected.split()]
    assert "blocks.0.attn.q.weight" in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("qkv", "there are blocks.*.attn.q, blocks.*.attn.k"),
        ("lm_head", "A head trains in full"),
        ("embed", "Embeddings, norms, experts"),
        ("blocks.7.*", "matches no linear layer"),
    ],
)
def test_a_pattern_without_a_linear_layer_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"lora.targets: {pattern!r} matches no")) as caught:
        _model(TINY, LoraConfig(rank=2, targets=("q", pattern)))
    assert reason in str(caught.value)


def test_dropout_depends_on_rows_alone() -> None:
    layer = _layer(bias=False, dropout=0.5)
    x = torch.ones(4, 3, 7)
    keys = row_keys(5, torch.arange(4))
    layer.train()
    layer.row_keys.of_rows = keys
    whole = layer(x)
    layer.row_keys.of_rows = keys[2:]
    assert torch.equal(layer(x[2:]), whole[2:])
    layer.row_keys.of_rows = keys
    assert torch.equal(layer(x.flatten(0, 1)).view(whole.shape), whole), "positions behind one another"
    assert not torch.equal(whole, layer.eval()(x))
