"""BERT's options of a Transformer: norms behind the sums, segments, an offset of positions, heads.

That they compute what BERT does is tested in tests/checkpoint/formats/test_huggingface_encoders.py.
"""

from typing import Any, Literal

import pytest
import torch
from support.tiny_models import SIZES, build, build_any
from torch import Tensor
from torch.nn.functional import cross_entropy

from distft.config import parse
from distft.errors import ConfigError
from distft.model.generation import Decoder, generate
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead
from distft.model.initialisation import initial_values
from distft.model.settings import AnyModelConfig
from distft.model.transformer_config import TransformerConfig
from distft.objective.cross_entropy import FusedLinearCrossEntropy, LossAndNumCorrect

BERT: dict[str, Any] = {
    **SIZES,
    "attention": "bidirectional",
    "norm": "layernorm",
    "norm_position": "post",
    "embedding_norm": True,
    "positions": "learned",
    "position_offset": 2,
    "num_segments": 2,
    "mlp": "gelu_exact",
    "attention_bias": True,
    "mlp_bias": True,
    "lm_head_transform": True,
}


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(5))


def test_the_loss_from_hidden_states_includes_the_bias_of_the_logits() -> None:
    """In value and gradients, of all positions and of few."""
    model = build(TransformerConfig(**BERT))
    labels = random_ids(2, 9).flatten()
    labels[::3] = -100
    torch.nn.init.normal_(model.lm_head.bias)
    expected = cross_entropy(model.logits(random_ids(2, 9)).flatten(0, 1), labels, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    fused = FusedLinearCrossEntropy(SIZES["vocab_size"])

    def loss_from_hidden(hidden: Tensor, weight: Tensor) -> Tensor:
        assert weight.shape[1] % 8 == 0
        return fused(hidden, weight, labels_N=labels)

    loss = model(random_ids(2, 9), losses_from_hidden={"lm_head": loss_from_hidden})["lm_head"]
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(gradients, expected_gradients)
    exact = LossAndNumCorrect(SIZES["vocab_size"])
    sums = model(random_ids(2, 9), losses_from_hidden={"lm_head": lambda x, w: exact(x, w, labels_N=labels)})[
        "lm_head"
    ]
    assert float(sums[0]) == pytest.approx(expected.item(), rel=1e-5)


def test_a_token_of_the_second_segment_has_another_embedding_than_one_of_the_first() -> None:
    model, ids = build(TransformerConfig(**BERT)), random_ids(1, 6)
    second = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert torch.equal(model.logits(ids), model.logits(ids, segment_ids=torch.zeros_like(ids)))
    assert not torch.allclose(model.logits(ids), model.logits(ids, segment_ids=second))


@pytest.mark.parametrize(
    ("settings", "segment_ids", "problem"),
    [
        ({"num_segments": 2}, [[0, 2]], "segment id 2, and model.num_segments=2.*raise it to 3"),
        ({"num_segments": 1}, [[0, 1]], "segment id 1, and model.num_segments=1"),
        ({}, [[0, 0]], "segment id 0, and model.num_segments=0.*leave segment ids out"),
    ],
    ids=str,
)
def test_segment_ids_without_an_embedding_are_refused(
    settings: dict[str, Any], segment_ids: list[list[int]], problem: str
) -> None:
    model = build(TransformerConfig(**SIZES, **settings))
    with pytest.raises(ConfigError, match=problem):
        model(random_ids(1, 2), segment_ids=torch.tensor(segment_ids))


def test_a_model_without_segments_refuses_segment_ids() -> None:
    model = build_any(
        parse(AnyModelConfig, {"type": "lstm", "vocab_size": 61, "max_seq_len": 8, "d_model": 6})
    )
    with pytest.raises(ConfigError, match=r"no segments: leave them out.*num_segments=2"):
        model(random_ids(1, 2), segment_ids=torch.zeros(1, 2, dtype=torch.int64))


def test_the_longest_row_has_positions_behind_the_offset_and_a_longer_one_is_refused() -> None:
    model = build(TransformerConfig(**BERT))
    longest = SIZES["max_seq_len"]
    assert model.position_embed.weight.shape[0] == longest + 2
    model.position_embed.weight.data[:2] = torch.nan  # never read
    assert model.logits(random_ids(1, longest)).isfinite().all()
    with pytest.raises(ConfigError, match=f"{longest + 1} tokens is longer than model.max_seq_len={longest}"):
        model.logits(random_ids(1, longest + 1))


def test_an_offset_needs_learned_positions() -> None:
    with pytest.raises(ValueError, match="position_offset=2 is a row of learned positions"):
        TransformerConfig(**SIZES, position_offset=2)


@pytest.mark.parametrize("mlp", ["geglu", "gelu_exact"])
def test_a_causal_model_of_these_options_generates_as_it_computes_whole_rows(
    mlp: Literal["geglu", "gelu_exact"],
) -> None:
    model = build(TransformerConfig(**{**BERT, "attention": "causal", "mlp": mlp}))
    ids = random_ids(1, 12)
    decoder = Decoder(model, ids[:, :5].tolist(), 8)
    with torch.no_grad():
        found = [decoder.prefill(), *(decoder.decode(ids[:, i]) for i in range(5, 12))]
        torch.testing.assert_close(torch.stack(found, 1), model.logits(ids)[:, 4:], rtol=0, atol=1e-5)


def test_a_bidirectional_one_generates_nothing() -> None:
    with pytest.raises(ConfigError, match="attention=bidirectional cannot generate"):
        generate(build(TransformerConfig(**BERT)), random_ids(1, 4), max_new_tokens=1)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(dropout: float) -> None:
    heads = {**LANGUAGE_MODEL, "classifier": ClassificationHead(num_labels=3, hidden="tanh")}
    rows = {"segment_ids": (torch.arange(8) >= 3).long().expand(2, 8), "dropout_keys": torch.arange(2)}
    model = build(TransformerConfig(**BERT, dropout=dropout), heads).train()
    gradients = []
    for mode in ("none", "selective", "full"):
        model.set_activation_checkpointing(mode)  # type: ignore[arg-type]
        model.zero_grad()
        sum(output.square().sum() for output in model(random_ids(2, 8), **rows).values()).backward()
        gradients.append([param.grad for param in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def test_norms_begin_as_ones_and_only_pre_norm_scales_what_writes_into_the_residual_stream() -> None:
    for position, factor in (("pre", 0.5), ("post", 1.0)):
        config = TransformerConfig(**{**BERT, "norm_position": position})
        assert config.residual_init_factor("blocks.0.attn.o.weight") == pytest.approx(factor)
        assert initial_values(config, "embed_norm.weight", (32,)).kind == "ones"
        assert initial_values(config, "lm_head.bias", (61,)).kind == "zeros"
        assert initial_values(config, "segment_embed.weight", (2, 32)).std == SIZES["init_std"]
