"""Heads by name, and masks of prefixes: against what they mean, written out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import SIZES, build
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from distft.errors import ConfigError
from distft.model.attention_kernels import attention, make_attention_mask
from distft.model.heads import (
    ClassificationHead,
    EmbeddingHead,
    GeneratorHead,
    Heads,
    LanguageModelHead,
    TokenHead,
)
from distft.model.transformer import Transformer
from distft.model.transformer_config import TransformerConfig

HEADS: Heads = {
    "lm_head": LanguageModelHead(),
    "topic": ClassificationHead(num_labels=3, pooling="mean"),
    "marks": TokenHead(num_outputs=2),
    "vector": EmbeddingHead(pooling="last", temperature=0.05, learns_temperature=True),
    "plain": EmbeddingHead(pooling="mean", normalize=False),
    "generator": GeneratorHead(num_layers=1, size=0.5),
}
IDS = torch.arange(20).view(2, 10) % 7 + 1
LENGTHS = torch.tensor([10, 6])


def hidden_of(model: Transformer) -> Tensor:
    """What the heads read, [B, T, C]."""
    found: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    model(IDS, lengths=LENGTHS, heads=("marks",))
    handle.remove()
    return found[0]


def test_each_head_is_what_its_name_says_of_the_last_hidden_states() -> None:
    model = build(TransformerConfig(**SIZES, attention="bidirectional"), HEADS)
    with torch.no_grad():
        model.vector.log_temperature.fill_(0.7)
    outputs, hidden = model(IDS, lengths=LENGTHS), hidden_of(model)
    assert list(outputs) == ["generator", *(name for name in HEADS if name != "generator")]
    mean = torch.stack([hidden[row, :length].mean(0) for row, length in enumerate(LENGTHS.tolist())])
    last = torch.stack([hidden[row, length - 1] for row, length in enumerate(LENGTHS.tolist())])
    unit = last / last.norm(dim=1, keepdim=True)
    expected = {
        "lm_head": hidden @ model.embed.weight.T,
        "topic": mean @ model.topic.weight.T,
        "marks": hidden @ model.marks.weight.T,
        "vector": unit / (0.05 * torch.tensor(0.7).exp()).sqrt(),
        "plain": mean,
    }
    for name, values in expected.items():
        torch.testing.assert_close(outputs[name], values, rtol=1e-5, atol=1e-6)
    cosine = unit @ unit.T
    similarities = outputs["vector"] @ outputs["vector"].T
    torch.testing.assert_close(similarities, cosine / (0.05 * torch.tensor(0.7).exp()), rtol=1e-5, atol=1e-5)


@given(st.lists(st.sampled_from(list(HEADS)), min_size=1, unique=True))
@settings(max_examples=10, deadline=None)
def test_only_the_heads_that_are_asked_for_are_computed_and_they_do_not_change(names: list[str]) -> None:
    model = build(TransformerConfig(**SIZES, attention="bidirectional"), HEADS)
    ran: list[str] = []
    for name in HEADS:
        hook = lambda _module, _inputs, _output, name=name: ran.append(name)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    outputs = model(IDS, lengths=LENGTHS, heads=names)
    assert set(outputs) == set(ran) == set(names)
    whole = model(IDS, lengths=LENGTHS)
    for name in names:
        torch.testing.assert_close(outputs[name], whole[name])


def test_a_generator_is_a_transformer_of_its_sizes_between_two_projections() -> None:
    head = GeneratorHead(num_layers=2, size=0.5)
    model = build(
        TransformerConfig(**SIZES, attention="bidirectional", positions="learned"), {"generator": head}
    )
    own = head.config(model.config)
    assert (own.d_model, own.num_heads, own.num_kv_heads, own.d_ff) == (16, 2, 2, 22)
    assert own.head_dim == model.config.head_dim
    alone = build(own)
    alone.blocks.load_state_dict(model.generator.blocks.state_dict())
    x = model.embed(IDS) + model.position_embed(torch.arange(10))
    x = x @ model.generator.input.weight.T
    mask = make_attention_mask(own, IDS.shape, None, LENGTHS)
    for block in alone.blocks:
        x = block(x, None, mask)
    x = model.generator.norm(x) @ model.generator.hidden.weight.T
    found = model(IDS, lengths=LENGTHS)["generator"]
    torch.testing.assert_close(found, x @ model.embed.weight.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_reaches_the_generator_and_changes_nothing(mode: Any) -> None:
    heads: Heads = {"generator": GeneratorHead(num_layers=2, size=0.5)}
    model = build(TransformerConfig(**SIZES, attention="bidirectional", dropout=0.2), heads).train()
    gradients = []
    for setting in ("none", mode):
        model.set_activation_checkpointing(setting)
        model.zero_grad()
        model(IDS, dropout_keys=torch.tensor([3, 4]))["generator"].square().sum().backward()
        gradients.append([p.grad for p in model.generator.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_prefix_mask_is_that_of_its_definition(data: st.DataObject) -> None:
    """Packed or padded rows of a causal model: a query sees what is before it, and its document's prefix."""
    num_rows, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    cells = st.lists(st.booleans(), min_size=width, max_size=width)
    is_prefix = torch.tensor([data.draw(cells) for _ in range(num_rows)])
    document_ids = lengths = None
    if data.draw(st.booleans()):
        starts = torch.tensor([data.draw(cells) for _ in range(num_rows)])
        document_ids = starts.long().cumsum(1)
    if data.draw(st.booleans()):
        lengths = torch.tensor([data.draw(st.integers(1, width)) for _ in range(num_rows)])
        is_prefix &= torch.arange(width) < lengths[:, None]  # padding is never marked
    config = TransformerConfig(**SIZES)
    mask = make_attention_mask(config, torch.Size([num_rows, width]), document_ids, lengths, is_prefix)
    expected = torch.zeros(num_rows, width, width, dtype=torch.bool)
    for row in range(num_rows):
        for query in range(width):
            for key in range(width):
                is_same = document_ids is None or document_ids[row, query] == document_ids[row, key]
                is_seen = key <= query or bool(is_prefix[row, key])
                expected[row, query, key] = bool(is_same) and is_seen
    assert isinstance(mask, Tensor)
    assert torch.equal(mask.expand(num_rows, 1, width, width)[:, 0], expected)
    q, k, v = torch.randn(3, num_rows, 2, width, 8, generator=torch.Generator().manual_seed(1))
    found = attention(q, k, v, mask, is_causal=True, kernel="sdpa")
    dense = scaled_dot_product_attention(q, k, v, attn_mask=expected[:, None])
    torch.testing.assert_close(found, dense)


def test_tokens_behind_a_prefix_change_nothing_before_them() -> None:
    model = build(TransformerConfig(**SIZES))
    is_prefix = torch.tensor([[True] * 4 + [False] * 6] * 2)
    first = model.logits(IDS, is_prefix=is_prefix)
    later, inside = IDS.clone(), IDS.clone()
    later[:, 7] += 1
    inside[:, 3] += 1
    torch.testing.assert_close(model.logits(later, is_prefix=is_prefix)[:, :7], first[:, :7])
    assert not torch.allclose(model.logits(inside, is_prefix=is_prefix)[:, 0], first[:, 0])


@pytest.mark.parametrize("name", ["blocks", "norm", "embed", "training", "forward", "type"])
def test_a_head_cannot_have_the_name_of_another_part(name: str) -> None:
    with pytest.raises(ConfigError, match=f"A head cannot have the name '{name}'"), torch.device("meta"):
        Transformer(TransformerConfig(**SIZES), {name: ClassificationHead(num_labels=3)})
