"""Fill in the middle: moved documents can be put together again, and all else stays as it was."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from context_losses import ORDERS, MiddleTargets
from hypothesis import given, settings
from hypothesis import strategies as st
from support.token_rows import (
    BOS,
    EOS,
    FIRST_TEXT_ID,
    VOCAB_SIZE,
    completions,
    data_context,
    documents,
    feed,
    packed,
    transform_context,
)

from distft.config import parse
from distft.data.documents import documents as documents_of
from distft.data.feed import Feed
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import ConfigError
from distft.objective.settings import ObjectiveConfig

PREFIX, SUFFIX, MIDDLE = MARKS = (VOCAB_SIZE - 3, VOCAB_SIZE - 2, VOCAB_SIZE - 1)
PIECES = {"<fim_prefix>": PREFIX, "<fim_suffix>": SUFFIX, "<fim_middle>": MIDDLE}


def moved(rows: Any, seq_len: int, seed: int = 7, **fim: Any) -> Feed:
    objective = parse(ObjectiveConfig, {"type": "causal_lm", "fim": fim})
    result = objective.transform_feed(feed(rows), data_context(seq_len, pieces=PIECES), seed)
    assert isinstance(result, Feed)
    return result


def texts(lengths: list[int], *, bos: bool = False) -> list[list[int]]:
    """Documents without the marks' ids."""
    return [[min(token, PREFIX - 1) for token in text] for text in documents(lengths, bos=bos)]


def put_together(tokens: list[int]) -> list[int]:
    """The text that the model is asked to complete, and its completion."""
    body = tokens[1:]
    if body[0] == SUFFIX:
        cut = body.index(MIDDLE)
        return body[cut + 1 :] + body[1:cut]  # prefix and middle, then suffix
    prefix, rest = body[: body.index(SUFFIX)], body[body.index(SUFFIX) + 1 :]
    cut = rest.index(MIDDLE)
    return prefix + rest[cut + 1 :] + rest[:cut]


@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    rate=st.sampled_from([0.3, 1.0]),
    spm_rate=st.sampled_from([0.0, 0.5, 1.0]),
    bos=st.booleans(),
    cuts=st.lists(st.integers(0, 5), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_a_moved_document_can_be_put_together_again(
    lengths: list[int], rate: float, spm_rate: float, bos: bool, cuts: list[int]
) -> None:
    rows = packed(texts([*lengths, 60], bos=bos), 20)
    result = moved(rows, 20, rate=rate, spm_rate=spm_rate)
    batch, plain = result.batch(0, 6), feed(rows).batch(0, 6)
    labels, before = batch.targets[NEXT_TOKEN], plain.targets[NEXT_TOKEN]
    assert torch.equal(labels == IGNORE_INDEX, before == IGNORE_INDEX)
    assert batch.num_targets == plain.num_targets
    assert batch.document_ids is not None
    assert plain.document_ids is not None
    assert torch.equal(batch.document_ids, plain.document_ids)
    # Each target is the next input, as before.
    inner = labels[:, :-1] != IGNORE_INDEX
    assert torch.equal(labels[:, :-1][inner], batch.input_ids[:, 1:][inner])
    assert batch.num_target_bytes == 3 * int(((labels >= 4) & (labels < PREFIX)).sum())
    for row, start, stop in documents_of(batch):
        found, original = (
            ids[row, start:stop].tolist()
            + [label for label in own[row, -1:].tolist() if stop == 20 and label >= 0]
            for ids, own in ((batch.input_ids, labels), (plain.input_ids, before))
        )
        if found == original:
            continue
        first, last = int(original[0] == BOS), len(original) - int(original[-1] == EOS)
        assert (found[:first], found[last:]) == (original[:first], original[last:])
        assert sorted(token for token in found if token in MARKS) == sorted(MARKS)
        assert found[first] == PREFIX
        assert (found[first + 1] == SUFFIX) or spm_rate < 1
        assert put_together(found[first:last]) == original[first : last - 3]
    for start, stop in pairwise(sorted({0, 6, *cuts})):
        part = moved(rows, 20, rate=rate, spm_rate=spm_rate).batch(start, stop)
        assert torch.equal(part.input_ids, batch.input_ids[start:stop])


def test_the_rates_are_shares_of_documents_and_joined_texts_are_moved_one_by_one() -> None:
    rows = packed(texts([39] * 1200), 40, "joined")
    batch = moved(rows, 40, rate=0.4, spm_rate=0.25).batch(0, 1100)
    texts_of_rows = batch.input_ids[:, :-1].numpy()  # each row is a text and its eos
    is_moved = texts_of_rows[:, 0] == PREFIX
    assert is_moved.mean() == pytest.approx(0.4, abs=0.05)
    assert (texts_of_rows[is_moved, 1] == SUFFIX).mean() == pytest.approx(0.25, abs=0.06)
    assert (batch.input_ids[:, -1] == EOS).all()
    # The target of a row's last token is the first one of another text, which is not moved with this one.
    assert (batch.targets[NEXT_TOKEN][:, -1] >= FIRST_TEXT_ID).all()
    several = moved(packed(texts([9] * 400), 40, "joined"), 40, rate=1.0).batch(0, 90)
    assert np.array_equal(several.input_ids.numpy()[:, 9::10], np.full((90, 4), EOS))
    assert np.array_equal(several.input_ids.numpy()[:, ::10], np.full((90, 4), PREFIX))


def test_bad_settings_tokenizers_and_data_are_clear_errors() -> None:
    rows = packed(texts([60]), 20)
    with pytest.raises(ConfigError, match="must differ"):
        parse(ObjectiveConfig, {"type": "causal_lm", "fim": {"prefix": "<a>", "suffix": "<a>"}})
    with pytest.raises(ConfigError, match=r"no piece <fim_prefix>, .*--symbol '<fim_prefix>' --symbol"):
        parse(ObjectiveConfig, {"type": "causal_lm", "fim": {}}).transform_feed(
            feed(rows), data_context(20, pieces={}), 0
        )
    with pytest.raises(ConfigError, match=r"prompts with completions"):
        moved(completions(documents([12, 7, 9]), prompt_length=4), 16)


@pytest.mark.parametrize("mode", ["separate", "joined"])
def test_a_comparison_of_contexts_has_the_tokens_of_the_middles_as_targets_in_every_order(mode: Any) -> None:
    own = feed(packed(texts([9, 20, 3, 14, 30, 1, 25]), 24, mode))
    context = transform_context(own, data_context(24, pieces=PIECES))
    mover = parse(ObjectiveConfig, {"type": "causal_lm", "fim": {}}).fim.mover(
        context, context.rows(np.zeros(1, np.int64))
    )
    found = {
        order: own.with_transforms(MiddleTargets(mover=mover, order=order)).batch(0, 9) for order in ORDERS
    }
    plain, psm = own.batch(0, 9), own.with_transforms(replace(mover, rate=1.0, spm_rate=0.0)).batch(0, 9)
    assert torch.equal(found["text_before_alone"].input_ids, plain.input_ids)
    assert torch.equal(found["psm"].input_ids, psm.input_ids)
    of_orders = [batch.targets[NEXT_TOKEN] for batch in found.values()]
    for labels in zip(*of_orders, strict=True):
        one, *others = [row[row != IGNORE_INDEX].tolist() for row in labels]
        assert all(other == one for other in others)
    for batch in found.values():
        labels = batch.targets[NEXT_TOKEN]
        is_target = labels[:, :-1] != IGNORE_INDEX
        assert torch.equal(labels[:, :-1][is_target], batch.input_ids[:, 1:][is_target])
        assert batch.num_targets == {NEXT_TOKEN: int((labels != IGNORE_INDEX).sum())}
    behind = num_texts = 0
    for ids in psm.input_ids.tolist():
        is_middle = False
        for token in ids:
            is_middle = token == MIDDLE or (is_middle and token != EOS)
            num_texts += token == MIDDLE
            behind += is_middle and token != MIDDLE
    # A middle that begins its text, and so its row or document, has one target less.
    assert 0 < behind - num_texts <= found["psm"].num_targets[NEXT_TOKEN] <= behind + len(psm.input_ids)
