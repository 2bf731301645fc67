"""Sliding windows, alternating layers, capped scores: against masks by hand, and packed, padded, cached."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import SIZES, build
from torch import Tensor
from torch.nn.functional import cross_entropy

from distft.data.batch import Batch
from distft.errors import ConfigError
from distft.model.attention_kernels import AttentionMask, attention, make_attention_mask
from distft.model.counts import Flops, forward_flops, num_attention_pairs, recomputed_flops, training_flops
from distft.model.generation import Decoder
from distft.model.heads import LANGUAGE_MODEL, GeneratorHead
from distft.model.transformer_config import TransformerConfig
from distft.objective.cross_entropy import FusedLinearCrossEntropy, LossAndNumCorrect

# A window of 4 in layers 0 and 2 of three, with all that may come with it.
ALTERNATING: dict[str, Any] = {
    **SIZES,
    "num_layers": 3,
    "num_kv_heads": 2,
    "sliding_window": 4,
    "global_attention_every": 2,
    "global_attention_offset": 1,
    "local_rope_theta": 50.0,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "attention_logit_softcap": 3.0,
    "final_logit_softcap": 5.0,
}
ATTENTIONS = st.sampled_from(["causal", "bidirectional"])


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(5))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@given(st.data(), ATTENTIONS)
@settings(max_examples=80, deadline=None)
def test_the_mask_is_that_of_its_definition(data: st.DataObject, direction: Any) -> None:
    """Packed or padded rows, with a prefix: what a layer without a window sees, but nothing too far away."""
    num_rows, width = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 8))
    window = data.draw(st.integers(1, 10))
    cells = st.lists(st.booleans(), min_size=width, max_size=width)
    given_rows: dict[str, Any] = {"document_ids": None, "lengths": None, "is_prefix": None}
    if data.draw(st.booleans()):
        given_rows["document_ids"] = torch.tensor([data.draw(cells) for _ in range(num_rows)]).cumsum(1)
    if data.draw(st.booleans()):
        given_rows["lengths"] = torch.tensor([data.draw(st.integers(1, width)) for _ in range(num_rows)])
    if data.draw(st.booleans()):
        given_rows["is_prefix"] = torch.tensor([data.draw(cells) for _ in range(num_rows)])
    config = TransformerConfig(**SIZES, attention=direction, sliding_window=window)
    shape = torch.Size([num_rows, width])

    def dense(mask: AttentionMask) -> Tensor:
        if mask is None:
            mask = torch.ones(1, 1, width, width, dtype=torch.bool)
            mask = mask.tril() if config.is_causal else mask
        assert isinstance(mask, Tensor)
        return mask.expand(num_rows, 1, width, width)[:, 0]

    found = dense(make_attention_mask(config, shape, **given_rows, reach=config.attention_reach))
    whole = dense(make_attention_mask(config, shape, **given_rows))
    for query in range(width):
        for key in range(width):
            apart = abs(query - key)
            is_near = apart < window if config.is_causal else apart <= window // 2
            assert torch.equal(found[:, query, key], whole[:, query, key] & is_near)


def test_a_causal_window_of_three_by_hand() -> None:
    config = TransformerConfig(**SIZES, sliding_window=3)
    found = make_attention_mask(config, torch.Size([1, 5]), None, None, reach=config.attention_reach)
    assert isinstance(found, Tensor)
    seen = ["10000", "11000", "11100", "01110", "00111"]
    assert ["".join(str(int(x)) for x in row) for row in found[0, 0]] == seen


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_window_as_long_as_the_row_changes_nothing(direction: Any, is_packed: bool) -> None:
    ids = random_ids(2, 12)
    documents = (torch.arange(12) // 5).expand(2, -1) if is_packed else None
    plain = build(TransformerConfig(**SIZES, attention=direction)).logits(ids, document_ids=documents)
    for window, is_equal in ((12 if direction == "causal" else 22, True), (3, False)):
        model = build(TransformerConfig(**SIZES, attention=direction, sliding_window=window))
        assert torch.equal(model.logits(ids, document_ids=documents), plain) == is_equal


def test_without_a_window_or_cap_a_row_has_no_mask() -> None:
    """So that the kernels for plain causal attention compute it."""
    shape = torch.Size([2, 9])
    for config in (TransformerConfig(**SIZES), TransformerConfig(**SIZES, sliding_window=9)):
        assert make_attention_mask(config, shape, None, None, reach=config.attention_reach) is None


@pytest.mark.parametrize(
    ("settings_", "windowed"),
    [
        ({"sliding_window": 2}, [0, 1, 2, 3]),
        ({"sliding_window": 2, "global_attention_every": 3}, [1, 2]),
        ({"sliding_window": 2, "global_attention_every": 2, "global_attention_offset": 1}, [0, 2]),
        ({"sliding_window": 2, "global_layers": [1, 2]}, [0, 3]),
        ({}, []),
    ],
    ids=str,
)
def test_which_layers_have_a_window(settings_: dict[str, Any], windowed: list[int]) -> None:
    """A token far away reaches the others through the layers without one, and through no other."""
    config = TransformerConfig(**SIZES | {"num_layers": 4}, **settings_)
    assert [layer for layer in range(4) if config.has_window(layer)] == windowed
    ids, changed = random_ids(1, 12), random_ids(1, 12)
    changed[0, 0] += 1
    model = build(config)
    is_reached = not torch.equal(model.logits(ids)[0, -1], model.logits(changed)[0, -1])
    assert is_reached == (len(windowed) < 4)


@given(cuts=st.lists(st.integers(1, 8), min_size=1, max_size=3), direction=ATTENTIONS)
@settings(deadline=None)
def test_a_packed_document_is_computed_as_if_it_were_alone(cuts: list[int], direction: Any) -> None:
    model = build(TransformerConfig(**ALTERNATING, attention=direction))
    ids = random_ids(1, sum(cuts))
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(cuts)])[None]
    restarting = torch.cat([torch.arange(n) for n in cuts])[None]
    with torch.no_grad():
        packed = model.logits(ids, restarting, documents)
        alone = torch.cat([model.logits(document) for document in ids.split(cuts, dim=1)], dim=1)
    close(packed, alone)


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=3), direction=ATTENTIONS)
@settings(deadline=None)
def test_right_padding_does_not_change_a_row(lengths: list[int], direction: Any) -> None:
    model = build(TransformerConfig(**ALTERNATING, attention=direction))
    ids = random_ids(len(lengths), 12)
    with torch.no_grad():
        padded = model.logits(ids, lengths=torch.tensor(lengths))
        for row, length in enumerate(lengths):
            close(padded[row, :length], model.logits(ids[row : row + 1, :length])[0])


def test_a_prefix_is_seen_as_far_as_the_window_reaches() -> None:
    model = build(TransformerConfig(**SIZES | {"num_layers": 1}, sliding_window=4))
    is_prefix = torch.arange(12)[None] < 8
    ids = random_ids(1, 12)
    whole = model.logits(ids, is_prefix=is_prefix)
    changed = ids.clone()
    changed[0, 5] += 1
    is_changed = (model.logits(changed, is_prefix=is_prefix) != whole).any(-1)[0]
    assert is_changed.nonzero()[:, 0].tolist() == [2, 3, 4, 5, 6, 7, 8]


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(
        st.lists(st.integers(0, SIZES["vocab_size"] - 1), min_size=1, max_size=12), min_size=1, max_size=3
    ),
    window=st.integers(1, 14),
)
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(prompts: list[list[int]], window: int) -> None:
    """Of prompts of different lengths, shorter and longer than the window."""
    model = build(TransformerConfig(**ALTERNATING | {"sliding_window": window}))
    decoder, rows = Decoder(model, prompts, 6), [list(prompt) for prompt in prompts]
    logits = decoder.prefill()
    for token in (5, 0, 7, 7, 1, 2):
        close(logits, torch.cat([model.logits(torch.tensor([row]))[:, -1] for row in rows]))
        rows = [[*row, token] for row in rows]
        logits = decoder.decode(torch.full((len(rows),), token))


@torch.no_grad()
def test_a_prompt_may_come_in_parts_of_any_length() -> None:
    model, ids = build(TransformerConfig(**ALTERNATING)), random_ids(2, 20)
    caches, found = model.new_caches(20), []
    for part in torch.arange(20)[None].split([1, 7, 2, 6, 4], dim=1):
        found.append(model.forward_cached(ids[:, part[0]], part.expand(2, -1), caches))
    close(torch.cat(found, dim=1), model.logits(ids)[:, [0, 7, 9, 15, 19]])


@torch.no_grad()
def test_the_cache_of_a_layer_with_a_window_forgets_what_nobody_sees() -> None:
    model = build(TransformerConfig(**ALTERNATING))
    decoder = Decoder(model, random_ids(1, 20).tolist(), 3)
    decoder.prefill()
    kept = [cache._k_BSGD for cache in decoder._caches]
    assert [keys.shape[1] for keys in kept if keys is not None] == [3, 23, 3]
    assert [len(cache) for cache in decoder._caches] == [20, 20, 20]
    assert kept[0] is not None
    assert kept[0].untyped_storage().nbytes() == kept[0].numel() * 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_flex_attention_equals_the_masked_kernel(direction: Any, is_packed: bool, cap: float | None) -> None:
    sizes = ALTERNATING | {"max_seq_len": 150, "d_model": 64, "init_std": 0.1, "sliding_window": 40}
    ids = random_ids(2, 143)
    documents = torch.stack([torch.arange(143) // 60, torch.arange(143) // 130]) if is_packed else None
    with torch.no_grad():
        logits = [
            build(
                TransformerConfig(
                    **sizes | {"attention_logit_softcap": cap}, attention=direction, attention_kernel=kernel
                )
            )(ids, document_ids=documents)["lm_head"]
            for kernel in ("auto", "flex")
        ]
    close(logits[1], logits[0])


def test_capped_scores_by_hand() -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(1))
    scores = 0.5 * torch.tanh(q @ k.transpose(2, 3) / 8**0.5 / 0.5)
    weights = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    found = attention(q, k, v, None, is_causal=True, kernel="auto", softcap=0.5)
    close(found, weights @ v)
    plain = attention(q, k, v, None, is_causal=True, kernel="auto")
    close(attention(q, k, v, None, is_causal=True, kernel="auto", softcap=1e4), plain)
    assert not torch.allclose(found, plain)


def test_the_loss_of_capped_logits_equals_that_of_the_logits_in_value_and_gradients() -> None:
    config = TransformerConfig(**ALTERNATING, pad_vocab_to=8)
    model, ids, labels = build(config), random_ids(2, 9), random_ids(2, 9).flatten()
    labels[::3] = -100
    logits = model.logits(ids).flatten(0, 1)[:, : SIZES["vocab_size"]]
    assert 1 < float(logits.detach().abs().max()) <= 5
    expected = cross_entropy(logits, labels, reduction="sum")
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss_fn, exact = FusedLinearCrossEntropy(SIZES["vocab_size"]), LossAndNumCorrect(SIZES["vocab_size"])
    own = {"lm_head": lambda x, w, **cap: loss_fn(x, w, labels_N=labels, **cap)}
    loss = model(ids, losses_from_hidden=own)["lm_head"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), gradients)
    own = {"lm_head": lambda x, w, **cap: exact(x, w, labels_N=labels, **cap)}
    sums = model(ids, losses_from_hidden=own)["lm_head"]
    assert float(sums[0]) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient_of_model_and_generator(mode: Any) -> None:
    heads = {**LANGUAGE_MODEL, "generator": GeneratorHead(num_layers=2, size=0.5)}
    model = build(TransformerConfig(**ALTERNATING, attention="bidirectional", dropout=0.2), heads).train()
    gradients = []
    for setting in ("none", mode):
        model.set_activation_checkpointing(setting)
        model.zero_grad()
        outputs = model(random_ids(2, 12), dropout_keys=torch.arange(2))
        sum(output.square().sum() for output in outputs.values()).backward()
        gradients.append([param.grad for param in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_without_the_first_norm_has_no_weight_of_it() -> None:
    model = build(TransformerConfig(**SIZES, embedding_norm=True, first_attention_norm=False))
    names = [name for name, _ in model.named_parameters() if "attn_norm" in name]
    assert names == ["blocks.1.attn_norm.weight"]


@given(
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    window=st.integers(1, 12),
    direction=ATTENTIONS,
    is_packed=st.booleans(),
)
@settings(deadline=None)
def test_pairs_in_a_window_are_counted_as_the_mask_has_them(
    cuts: list[int], window: int, direction: Any, is_packed: bool
) -> None:
    """Both ways round, as usual for causal attention, too."""
    config = TransformerConfig(**SIZES | {"max_seq_len": 40}, attention=direction, sliding_window=window)
    reach, width = config.attention_reach, sum(cuts)
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(cuts)]).expand(2, -1)
    positions = torch.cat([torch.arange(n) for n in cuts]).expand(2, -1)
    batch = Batch(input_ids=torch.zeros(2, width), targets={}, num_targets={})
    if is_packed:
        batch = replace(batch, document_ids=documents, position_ids=positions)
    bidirectional = config.model_copy(update={"attention": "bidirectional"})
    own = documents if is_packed else None
    mask = make_attention_mask(bidirectional, batch.input_ids.shape, own, None, reach=reach)
    whole = mask.expand(2, 1, width, width).sum() if isinstance(mask, Tensor) else 2 * width**2
    lengths = cuts if is_packed else [width]
    assert reach is not None
    assert 2 * sum(num_attention_pairs(length, reach) for length in lengths) == int(whole)
    assert 2 * sum(num_attention_pairs(length) for length in lengths) == batch.num_attention_pairs
    prepared = batch.for_step(None, reach).to(torch.device("meta"))
    assert prepared.work == {"": (2 * width, batch.num_attention_pairs, int(whole))}
    assert batch.for_step(None).work == {"": (2 * width, *[batch.num_attention_pairs] * 2)}


def test_flops_of_layers_with_a_window_count_the_pairs_in_it() -> None:
    """Of alternating layers: as many as two models have, each with one kind of layers."""
    sizes = ALTERNATING | {"global_attention_offset": 0, "global_attention_every": None}
    mixed = TransformerConfig(**ALTERNATING)
    plain = TransformerConfig(**SIZES | {"num_layers": 3, "num_kv_heads": 2})
    local = TransformerConfig(**sizes)
    pairs, near = num_attention_pairs(20), num_attention_pairs(20, mixed.attention_reach)
    assert near == 20 + 2 * (19 + 18 + 17)
    for count in (
        lambda config: forward_flops(config, 20),
        lambda config: training_flops(config, 20),
        lambda config: training_flops(config, 20, trainable=["blocks.1.attn.o.weight"]),
        lambda config: recomputed_flops(config, ["blocks.1.attn.q.weight"]),
    ):
        of_plain, of_local, of_mixed = count(plain), count(local), count(mixed)
        assert of_local.of(20, pairs, near) == of_plain.of(20, near)
        assert of_mixed.of(20, 0, 0) == of_plain.of(20, 0)
        assert of_mixed.of(20, pairs) == of_plain.of(20, pairs)
    assert forward_flops(mixed, 20) == Flops(
        forward_flops(plain, 20).per_token, plain.flops_per_pair, 2 * plain.flops_per_pair
    )
    assert training_flops(mixed, 20, trainable=["blocks.1.attn.q.weight"]) == Flops(
        training_flops(plain, 20, trainable=["blocks.1.attn.q.weight"]).per_token,
        3 * plain.flops_per_pair,  # of layer 1 with its backward
        4 * plain.flops_per_pair,  # of layer 0 the forward alone, of layer 2 the backward, too
    )


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"sliding_window": 0}, "sliding_window"),
    ({"global_attention_every": 2}, "global_attention_every is set, but no layer has a window"),
    ({"global_layers": [1]}, "global_layers is set, but no layer has a window"),
    ({"local_rope_theta": 5.0}, "local_rope_theta is set, but no layer has a window"),
    (
        {"sliding_window": 4, "global_attention_every": 2, "global_attention_offset": 2},
        "global_attention_offset=2 must be less than global_attention_every=2",
    ),
    ({"sliding_window": 4, "global_attention_offset": 1}, "must be less than global_attention_every=null"),
    ({"sliding_window": 4, "global_layers": [2]}, "global_layers has 2, but the layers are 0 to 1"),
    (
        {"sliding_window": 4, "global_layers": [1], "global_attention_every": 2},
        "global_attention_every and global_layers",
    ),
    ({"sliding_window": 4, "attention_kernel": "cudnn"}, "cudnn computes no windows: set attention_kernel"),
    ({"attention_logit_softcap": 4, "attention_kernel": "sdpa"}, "sdpa cannot cap scores"),
    ({"attention_logit_softcap": 4, "attention_kernel": "cudnn"}, "cudnn cannot cap scores"),
    ({"attention_logit_softcap": 0}, "attention_logit_softcap"),
    ({"final_logit_softcap": -1}, "final_logit_softcap"),
    ({"first_attention_norm": False, "norm_position": "post"}, "set norm_position: pre"),
    (
        {"positions": "learned", "rope_scaling": {"type": "linear", "factor": 2}},
        "rope_scaling is set, but positions=learned",
    ),
    ({"rope_scaling": {"type": "ntk", "factor": 2}, "head_dim": 2}, "head_dim=2 has no second pair"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_seq_len": 8}, "rope_theta": 1},
        "rope_theta=1 must be above 1",
    ),
]


@pytest.mark.parametrize(("changes", "problem"), WRONG, ids=str)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], problem: str) -> None:
    from distft.config import parse

    with pytest.raises(ConfigError, match=problem) as failure:
        parse(TransformerConfig, SIZES | changes, where="model")
    assert len(str(failure.value).splitlines()) == 1
