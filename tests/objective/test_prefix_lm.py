"""Prefix language models: the prefix of each document, what has a target, and what attends to what."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import SIZES, build
from support.token_rows import VOCAB_SIZE, completions, data_context, documents, feed, packed, text_pairs
from torch.nn.functional import cross_entropy

from distft.collectives import SingleProcess
from distft.config import parse
from distft.data.batch import Batch
from distft.data.documents import documents as documents_of
from distft.data.feed import Feed
from distft.data.prefixes import PrefixMarker
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import ObjectiveContext
from distft.objective.prefix_lm import PrefixLM
from distft.objective.settings import ObjectiveConfig

CONTEXT = ObjectiveContext(VOCAB_SIZE, SingleProcess())


def prefixed(rows: Any, seq_len: int, seed: int = 7, **changes: Any) -> Feed:
    objective = parse(ObjectiveConfig, {"type": "prefix_lm", **changes})
    result = objective.transform_feed(feed(rows), data_context(seq_len), seed)
    assert isinstance(result, Feed)
    return result


@given(
    lengths=st.lists(st.integers(1, 30), min_size=3, max_size=9),
    low=st.floats(0, 0.9),
    width=st.floats(0.0, 1.0),
    mode=st.sampled_from(["separate", "joined"]),
    cuts=st.lists(st.integers(0, 6), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_each_document_has_a_prefix_of_the_share_and_targets_behind_it(
    lengths: list[int], low: float, width: float, mode: Any, cuts: list[int]
) -> None:
    rows = packed(documents([*lengths, 30]), 16, mode)
    high = min(low + width, 1.0) or 1.0
    shares: dict[str, Any] = {"min_prefix_share": low, "max_prefix_share": high}
    batch, plain = prefixed(rows, 16, **shares).batch(0, 6), feed(rows).batch(0, 6)
    assert batch.is_prefix is not None
    labels, before = batch.targets[NEXT_TOKEN], plain.targets[NEXT_TOKEN]
    assert torch.equal(batch.input_ids, plain.input_ids)
    for row, start, stop in documents_of(batch):
        marks = batch.is_prefix[row, start:stop].tolist()
        size = sum(marks)
        assert marks == [True] * size + [False] * (stop - start - size)
        own, original = labels[row, start:stop].tolist(), before[row, start:stop].tolist()
        inside = max(size - 1, 0)
        assert own == [IGNORE_INDEX] * inside + original[inside:]
        if any(label != IGNORE_INDEX for label in original):
            assert any(label != IGNORE_INDEX for label in own)
            assert size <= high * (stop - start)
            # Only that one target is left makes a prefix shorter than the share.
            assert size >= int(low * (stop - start)) or sum(label != IGNORE_INDEX for label in own) == 1
    assert batch.num_targets == {NEXT_TOKEN: int((labels != IGNORE_INDEX).sum())}
    assert batch.num_target_bytes == 3 * int((labels >= 4).sum())
    for start, stop in pairwise(sorted({0, 6, *cuts})):
        part = prefixed(rows, 16, **shares).batch(start, stop)
        assert part.is_prefix is not None
        assert torch.equal(part.is_prefix, batch.is_prefix[start:stop])
        assert torch.equal(part.targets[NEXT_TOKEN], labels[start:stop])


def test_prefix_lengths_are_uniform_and_follow_the_seed() -> None:
    rows = packed(documents([64 * 900]), 64)
    first, second = (prefixed(rows, 64, seed=seed).batch(0, 800).is_prefix for seed in (1, 2))
    assert first is not None
    assert second is not None
    sizes = first.sum(dim=1).double()
    assert sizes.mean().item() == pytest.approx(31.5, abs=2)
    assert sizes.std().item() == pytest.approx(64 / 12**0.5, abs=1)
    assert not torch.equal(first, second)


def test_a_document_keeps_its_last_target_whatever_the_share() -> None:
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 9, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]])
    batch = Batch(
        input_ids=torch.arange(5, 11)[None],
        targets={NEXT_TOKEN: labels},
        num_targets={NEXT_TOKEN: 1},
        sequence_numbers=torch.zeros(1, dtype=torch.int64),
    )
    marker = PrefixMarker(seed=0, min_share=0.9, max_share=1.0, is_prompt=False, token_bytes=None)
    marked = marker(batch)
    assert marked.is_prefix is not None
    assert marked.is_prefix.tolist() == [[True] * 3 + [False] * 3]
    assert torch.equal(marked.targets[NEXT_TOKEN], labels)


def test_a_prompt_is_the_prefix_of_a_completion() -> None:
    rows = completions(documents([12, 7, 9]), prompt_length=4)
    batch, plain = prefixed(rows, 16, prefix="prompt").batch(0, 3), feed(rows).batch(0, 3)
    assert batch.is_prefix is not None
    assert batch.is_prefix.tolist() == [[True] * 4 + [False] * 8] * 3
    assert torch.equal(batch.targets[NEXT_TOKEN], plain.targets[NEXT_TOKEN])


def test_loss_and_gradient_equal_those_of_rows_of_one_document_with_a_written_mask() -> None:
    """Packed documents, against each by itself, with attention computed from an explicit matrix."""
    objective = PrefixLM()
    model = build(TransformerConfig(**{**SIZES, "vocab_size": VOCAB_SIZE}), objective.heads(None))
    batch = prefixed(packed(documents([9, 4, 13, 20]), 24), 24).batch(0, 2)
    assert batch.is_prefix is not None
    loss = objective.loss_sums(model, batch, CONTEXT)[NEXT_TOKEN]
    loss.backward()
    gradients = [param.grad for param in model.parameters()]
    model.zero_grad()
    total = torch.zeros(())
    for row, start, stop in documents_of(batch):
        size = int(batch.is_prefix[row, start:stop].sum())
        logits = model.logits(
            batch.input_ids[row : row + 1, start:stop],
            is_prefix=torch.arange(stop - start)[None] < size,
        )
        total = total + cross_entropy(
            logits[0].float(), batch.targets[NEXT_TOKEN][row, start:stop], reduction="sum"
        )
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    for gradient, param in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, param.grad, rtol=1e-4, atol=1e-5)


def test_a_token_sees_the_prefix_and_all_before_it_and_nothing_else() -> None:
    model = build(TransformerConfig(**{**SIZES, "vocab_size": VOCAB_SIZE}), PrefixLM().heads(None))
    ids = torch.arange(5, 15)[None]
    is_prefix = torch.arange(10)[None] < 4
    logits = model.logits(ids, is_prefix=is_prefix)[0]
    for place in range(10):
        other = ids.clone()
        other[0, place] = 30
        changed = (model.logits(other, is_prefix=is_prefix)[0] != logits).any(dim=1).tolist()
        assert changed == [place < 4 or position >= place for position in range(10)]


def test_bad_settings_models_and_data_are_clear_errors() -> None:
    rows = packed(documents([60]), 16)
    with pytest.raises(ConfigError, match="exchange them"):
        parse(ObjectiveConfig, {"type": "prefix_lm", "min_prefix_share": 0.5, "max_prefix_share": 0.2})
    with pytest.raises(ConfigError, match="have no effect with prefix: prompt"):
        parse(ObjectiveConfig, {"type": "prefix_lm", "prefix": "prompt", "max_prefix_share": 0.2})
    with pytest.raises(ConfigError, match=r"attention=bidirectional with objective\.type=prefix_lm"):
        PrefixLM().check_model(TransformerConfig(**SIZES, attention="bidirectional"))
    with pytest.raises(ConfigError, match=r"objective\.prefix=prompt: these rows are packed"):
        prefixed(rows, 16, prefix="prompt")
    for kind in ("prefix_lm", "causal_lm"):
        with pytest.raises(ConfigError, match=rf"type={kind} continues texts, and these rows are none"):
            parse(ObjectiveConfig, {"type": kind}).transform_feed(
                feed(text_pairs(documents([9, 9]))), data_context(16), 0
            )
    with pytest.raises(ConfigError, match=r"prefix_lm cannot learn labels"):
        PrefixLM().heads(("a", "b"))
