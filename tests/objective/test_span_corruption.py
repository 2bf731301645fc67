"""Span corruption: nothing is lost, T5's numbers of spans, what has a target, and what attends to what."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import SIZES, build
from support.token_rows import (
    EOS,
    FIRST_TEXT_ID,
    MASK,
    VOCAB_SIZE,
    data_context,
    feed,
    packed,
    padded,
)
from torch.nn.functional import cross_entropy

from distft.collectives import SingleProcess
from distft.config import parse
from distft.data.batch import Batch
from distft.data.documents import documents as documents_of
from distft.data.feed import Feed
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import ObjectiveContext
from distft.objective.settings import ObjectiveConfig
from distft.objective.span_corruption import SpanCorruption

CONTEXT = ObjectiveContext(VOCAB_SIZE, SingleProcess())
NUM_SENTINELS = 12
SENTINELS = {f"<extra_id_{i}>": VOCAB_SIZE - 1 - i for i in range(NUM_SENTINELS)}  # descending, as in T5
FIRST_SENTINEL = VOCAB_SIZE - NUM_SENTINELS


def corrupted(rows: Any, seq_len: int, seed: int = 7, **changes: Any) -> Feed:
    context = data_context(seq_len, **{"pieces": {"<mask>": MASK, **SENTINELS}, **changes.pop("context", {})})
    objective = parse(ObjectiveConfig, {"type": "span_corruption", **changes})
    result = objective.transform_feed(feed(rows), context, seed)
    assert isinstance(result, Feed)
    return result


def texts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Documents without the ids of sentinels."""
    random = np.random.default_rng(seed)
    return [[*random.integers(FIRST_TEXT_ID, FIRST_SENTINEL, n).tolist(), EOS] for n in lengths]


def examples(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """Prefix, behind it the inputs, and the targets of each document."""
    assert batch.is_prefix is not None
    found = []
    for row, start, stop in documents_of(batch):
        size = int(batch.is_prefix[row, start:stop].sum())
        labels = batch.targets[NEXT_TOKEN][row, start:stop].tolist()
        assert labels[: size - 1] == [IGNORE_INDEX] * (size - 1)
        ids = batch.input_ids[row, start:stop].tolist()
        assert batch.is_prefix[row, start : start + size].all()
        assert ids[size:] == labels[size - 1 : -1]  # each target is the next input
        assert batch.position_ids is not None
        assert batch.position_ids[row, start:stop].tolist() == list(range(stop - start))
        found.append((ids[:size], ids[size:], labels[size - 1 :]))
    return found


def restored(prefix: list[int], targets: list[int]) -> tuple[list[int], int]:
    """The text, with each span in the place of its sentinel, and the number of spans."""
    assert prefix[-1] == targets[-1] == EOS
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token >= FIRST_SENTINEL:
            assert token == VOCAB_SIZE - 1 - len(spans)
            spans[token] = []
        else:
            spans[VOCAB_SIZE - len(spans)].append(token)
    text = [piece for token in prefix[:-1] for piece in spans.get(token, [token])]
    assert [token for token in prefix if token >= FIRST_SENTINEL] == list(spans)
    assert all(spans.values())
    return text, len(spans)


@given(
    lengths=st.lists(st.integers(1, 50), min_size=2, max_size=8),
    density=st.floats(0.05, 0.6),
    mean=st.floats(1.0, 5.0),
    cuts=st.lists(st.integers(0, 5), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_prefix_and_spans_are_the_document_cut_at_its_end(
    lengths: list[int], density: float, mean: float, cuts: list[int]
) -> None:
    rows = packed(texts([*lengths, 40]), 24)
    changes: dict[str, Any] = {
        "noise_density": density,
        "mean_span_length": mean,
        "context": {"pieces": SENTINELS},
    }
    batch, plain = corrupted(rows, 24, **changes).batch(0, 5), feed(rows).batch(0, 5)
    originals = [plain.input_ids[row, start:stop].tolist() for row, start, stop in documents_of(plain)]
    found = iter(examples(batch))
    for original in originals:
        text = original[:-1] if original[-1] == EOS else original
        length = next(
            (
                n
                for n in range(len(text), 1, -1)
                if n + 2 * t5_counts(n, density, mean)[1] + 1 <= len(original)
            ),
            0,
        )
        if not length:
            continue
        prefix, _, targets = next(found)
        assert restored(prefix, targets) == (text[:length], t5_counts(length, density, mean)[1])
        num_noise = sum(FIRST_TEXT_ID <= token < FIRST_SENTINEL for token in targets)
        assert num_noise == t5_counts(length, density, mean)[0]
    assert next(found, None) is None
    assert batch.num_targets == {NEXT_TOKEN: int((batch.targets[NEXT_TOKEN] != IGNORE_INDEX).sum())}
    for start, stop in pairwise(sorted({0, 5, *cuts})):
        part = corrupted(rows, 24, **changes).batch(start, stop)
        for name in ("input_ids", "document_ids", "is_prefix", "lengths"):
            assert torch.equal(getattr(part, name), getattr(batch, name)[start:stop])


def t5_counts(length: int, density: float, mean: float) -> tuple[int, int]:
    """Noise tokens and spans in `random_spans_noise_mask` of T5, which needs as much text as spans."""
    num_noise = min(max(int(np.round(length * density)), 1), length - 1)
    num_spans = max(int(np.round(num_noise / mean)), 1)
    return num_noise, min(num_spans, num_noise, length - num_noise)


def test_spans_lie_anywhere_behind_the_first_token_and_follow_the_seed() -> None:
    rows = packed([texts([40 * 300])[0][:-1]], 40)
    first = corrupted(rows, 40).batch(0, 280)
    places = np.zeros(40)
    for prefix, _, _ in examples(first):
        for place in np.flatnonzero(np.array(prefix) >= FIRST_SENTINEL):
            places[place] += 1
    assert places[0] == 0
    assert (places[1:29] > 0).all()
    assert places.max() == 280  # the last span of each text ends it, as in T5
    assert not torch.equal(first.input_ids, corrupted(rows, 40, seed=8).batch(0, 280).input_ids)


def test_without_sentinels_all_spans_have_the_mask_token_in_order() -> None:
    rows = packed(texts([200]), 40)
    feed_of_one = corrupted(rows, 40, noise_density=0.3, context={"pieces": {"<mask>": MASK}})
    many, one = corrupted(rows, 40, noise_density=0.3).batch(0, 4), feed_of_one.batch(0, 4)
    assert torch.equal(torch.where(many.input_ids >= FIRST_SENTINEL, MASK, many.input_ids), one.input_ids)
    (note,) = [line for line in feed_of_one.summary.splitlines() if "sentinel" in line]
    assert f"one sentinel, id {MASK}, in order: the tokenizer has no <extra_id_0>. " in note
    assert "`distft tokenizer train --symbol '<extra_id_0>'`" in note
    assert "sentinel" not in corrupted(rows, 40).summary


def test_loss_and_gradient_equal_those_of_each_document_by_itself() -> None:
    objective = SpanCorruption()
    model = build(TransformerConfig(**{**SIZES, "vocab_size": VOCAB_SIZE}), objective.heads(None))
    batch = corrupted(packed(texts([14, 7, 20, 30]), 24), 24).batch(0, 3)
    loss = objective.loss_sums(model, batch, CONTEXT)[NEXT_TOKEN]
    loss.backward()
    gradients = [param.grad for param in model.parameters()]
    model.zero_grad()
    total = torch.zeros(())
    for prefix, inputs, targets in examples(batch):
        ids = torch.tensor([prefix + inputs])
        logits = model.logits(ids, is_prefix=torch.arange(ids.shape[1])[None] < len(prefix))[0]
        total = total + cross_entropy(logits[len(prefix) - 1 :], torch.tensor(targets), reduction="sum")
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    for gradient, param in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, param.grad, rtol=1e-4, atol=1e-5)


def test_bad_settings_models_tokenizers_and_data_are_clear_errors() -> None:
    rows = packed(texts([200]), 80)
    with pytest.raises(ConfigError, match=r"attention=bidirectional with objective\.type=span_corruption"):
        SpanCorruption().check_model(TransformerConfig(**SIZES, attention="bidirectional"))
    with pytest.raises(
        ConfigError, match=r"make 13 spans of a row of 80 tokens, but .* end at <extra_id_11>"
    ):
        corrupted(rows, 80, noise_density=0.25, mean_span_length=1.0)
    with pytest.raises(ConfigError, match=r"batch\.seq_len=4 leaves no target"):
        corrupted(packed(texts([200]), 4), 4)
    with pytest.raises(ConfigError, match="too short for a span"):
        corrupted(padded(texts([1, 2])), 80)
    with pytest.raises(ConfigError, match=r"--symbol '<mask>'"):
        corrupted(rows, 80, context={"pieces": {}, "unk_id": None})
