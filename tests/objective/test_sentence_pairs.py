"""Next sentence and sentence order: the pairs and their labels, and the losses alone and with masking."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import SIZES, build
from support.token_rows import (
    BOS,
    EOS,
    FIRST_TEXT_ID,
    MASK,
    VOCAB_SIZE,
    data_context,
    documents,
    feed,
    packed,
    padded,
    text_pairs,
)
from torch.nn.functional import cross_entropy

from distft.collectives import SingleProcess
from distft.config import parse
from distft.data.batch import Batch
from distft.data.documents import documents as documents_of
from distft.data.feed import Feed
from distft.data.targets import IGNORE_INDEX, MASKED_TOKEN
from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import ObjectiveContext
from distft.objective.sentence_pairs import NextSentence, SentenceOrder
from distft.objective.settings import ObjectiveConfig

CONTEXT = ObjectiveContext(VOCAB_SIZE, SingleProcess())
KINDS = ("next_sentence", "sentence_order")


def pairs(rows: Any, seq_len: int, kind: str, seed: int = 7, **changes: Any) -> Feed:
    context = data_context(seq_len, **changes.pop("context", {}))
    objective = parse(ObjectiveConfig, {"type": kind, **changes})
    result = objective.transform_feed(feed(rows), context, seed)
    assert isinstance(result, Feed)
    return result


def longest_texts(batch: Batch) -> list[list[int]]:
    """The longest document of each row, the first of equal ones, without special ids."""
    texts: list[list[int]] = [[] for _ in batch.input_ids]
    for row, start, stop in documents_of(batch):
        text = [token for token in batch.input_ids[row, start:stop].tolist() if token > MASK]
        texts[row] = max(texts[row], text, key=len)
    return texts


def halves(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """The two texts of each row: `bos text eos text eos`."""
    assert batch.lengths is not None
    found = []
    for ids, length in zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True):
        assert (ids[0], ids[length - 1]) == (BOS, EOS)
        cut = ids.index(EOS)
        found.append((ids[1:cut], ids[cut + 1 : length - 1]))
    return found


@given(
    lengths=st.lists(st.integers(2, 40), min_size=2, max_size=8),
    kind=st.sampled_from(KINDS),
    is_packed=st.booleans(),
    cuts=st.lists(st.integers(0, 12), max_size=2),
)
@settings(max_examples=40, deadline=None)
def test_a_pair_is_the_rows_longest_document_as_it_was_or_changed(
    lengths: list[int], kind: str, is_packed: bool, cuts: list[int]
) -> None:
    texts = documents([*lengths, 30])
    rows = packed([*texts, *documents([30])], 24) if is_packed else padded(texts)
    result = pairs(rows, 24, kind)
    batch, plain = result.batch(0, 12), feed(rows).batch(0, 12)
    labels = batch.targets[kind]
    every_text = longest_texts(feed(rows).batch(0, rows.num_sequences))
    originals = [text[: 24 - 3] for text in longest_texts(plain)]
    for (first, second), text, label in zip(halves(batch), originals, labels.tolist(), strict=True):
        if len(text) < 2:
            assert label == IGNORE_INDEX
        elif label == 0:
            assert first + second == text
        elif kind == "sentence_order":
            assert second + first == text
        else:
            assert text[: len(first)] == first
            assert len(second) <= len(text) - len(first)
            assert any(contains(other, second) for other in every_text)
    assert batch.num_targets == {kind: int((labels != IGNORE_INDEX).sum())}
    for start, stop in pairwise(sorted({0, 12, *cuts})):
        part = result.batch(start, stop)
        assert torch.equal(part.input_ids, batch.input_ids[start:stop, : part.input_ids.shape[1]])
        assert torch.equal(part.targets[kind], labels[start:stop])
    assert (result.batch(3, 3).targets[kind] == IGNORE_INDEX).all()


def contains(text: list[int], part: list[int]) -> bool:
    return any(text[start : start + len(part)] == part for start in range(len(text) - len(part) + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_pairs_are_changed_and_words_begin_at_the_cut(kind: str) -> None:
    rows = padded(documents([30] * 500))
    batch = pairs(rows, 40, kind).batch(0, 500)
    labels = batch.targets[kind]
    assert labels.double().mean().item() == pytest.approx(0.5, abs=0.07)
    texts = longest_texts(feed(rows).batch(0, 500))
    cuts = []
    for (first, second), text, label in zip(halves(batch), texts, labels.tolist(), strict=True):
        if label == 0:
            assert second[0] % 2 == 0
            cuts.append(len(first))
        elif kind == "next_sentence":
            assert not contains(text, second)  # another row's
    assert np.mean(cuts) == pytest.approx(15, abs=1)
    assert np.quantile(cuts, [0.02, 0.98]) == pytest.approx([7.5, 22.5], abs=2)
    again = pairs(rows, 40, kind, seed=8).batch(0, 500).targets[kind]
    assert not torch.equal(again, labels)


def test_the_other_row_of_next_sentence_is_never_the_same_one() -> None:
    """In later epochs the same row has another number."""
    rows = padded(documents([20, 20, 20]))
    batch, plain = pairs(rows, 40, "next_sentence").batch(0, 300), feed(rows).batch(0, 300)
    changed = 0
    for (_, second), text, label in zip(
        halves(batch), longest_texts(plain), batch.targets["next_sentence"].tolist(), strict=True
    ):
        assert contains(text, second) == (label == 0)
        changed += label
    assert changed > 100


@pytest.mark.parametrize("kind", KINDS)
def test_joined_with_masking_the_pair_is_masked_and_its_label_stays(kind: str) -> None:
    rows = packed(documents([40] * 200), 40)
    alone = pairs(rows, 40, kind).batch(0, 100)
    joined = pairs(rows, 40, kind, masking={"mask_rate": 0.3}).batch(0, 100)
    assert torch.equal(joined.targets[kind], alone.targets[kind])
    labels = joined.targets[MASKED_TOKEN]
    is_target = labels != IGNORE_INDEX
    assert torch.equal(torch.where(is_target, labels, joined.input_ids), alone.input_ids)
    num_text = int((alone.input_ids >= FIRST_TEXT_ID).sum())
    assert int(is_target.sum()) / num_text == pytest.approx(0.3, abs=0.01)
    assert joined.num_targets == {kind: alone.num_targets[kind], MASKED_TOKEN: int(is_target.sum())}


@pytest.mark.parametrize("objective_type", [NextSentence, SentenceOrder])
@pytest.mark.parametrize("masking", [None, {}])
def test_losses_gradients_and_metrics_equal_those_computed_from_the_logits(
    objective_type: Any, masking: Any
) -> None:
    objective = objective_type.model_validate({"masking": masking, "pooling": "first"})
    heads = objective.heads(None)
    assert set(heads) == {objective.name} | ({"lm_head"} if masking is not None else set())
    config = TransformerConfig(
        **{**SIZES, "vocab_size": VOCAB_SIZE, "max_seq_len": 32}, attention="bidirectional"
    )
    model = build(config, heads)
    rows = packed(documents([11] * 60), 32)
    settings = {} if masking is None else {"masking": masking}
    batch = pairs(rows, 32, objective.name, pooling="first", **settings).batch(0, 7)
    sums = objective.loss_sums(model, batch, CONTEXT)
    assert set(sums) == set(objective.term_weights(0)) == set(objective.num_targets(batch))
    weighted = sum((i + 1) * value for i, value in enumerate(sums.values()))
    weighted.backward()
    gradients = [param.grad for param in model.parameters()]
    model.zero_grad()
    outputs = model(**batch.model_inputs)
    labels = batch.targets[objective.name]
    expected = cross_entropy(outputs[objective.name], labels, reduction="sum")
    metrics = {
        "loss": cross_entropy(outputs[objective.name].double(), labels).item(),
        "accuracy": (outputs[objective.name].argmax(dim=1) == labels).double().mean().item(),
    }
    if masking is not None:
        tokens = batch.targets[MASKED_TOKEN].flatten()
        logits = outputs["lm_head"].flatten(0, 1)
        expected = expected + 2 * cross_entropy(logits, tokens, reduction="sum")
        of_tokens = cross_entropy(logits.double(), tokens).item()
        right = (logits.argmax(dim=1) == tokens)[tokens != IGNORE_INDEX].double().mean().item()
        metrics = {
            "loss": metrics["loss"] + of_tokens,
            **{f"{objective.name}/{name}": value for name, value in metrics.items()},
            "masked_token/loss": of_tokens,
            "masked_token/perplexity": np.exp(of_tokens),
            "masked_token/accuracy": right,
        }
    expected.backward()
    torch.testing.assert_close(torch.as_tensor(weighted), expected)
    for gradient, param in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, param.grad, rtol=1e-4, atol=1e-5)
    assert objective.metrics(objective.evaluate(model, batch, CONTEXT)) == pytest.approx(metrics, rel=1e-5)


def test_bad_settings_models_tokenizers_and_data_are_clear_errors() -> None:
    rows = padded(documents([30, 30]))
    causal = TransformerConfig(**SIZES)
    with pytest.raises(ConfigError, match=r"attention=causal with objective\.type=next_sentence and masking"):
        NextSentence.model_validate({"masking": {}}).check_model(causal)
    with pytest.raises(ConfigError, match=r"pooling=first with model\.attention=causal"):
        SentenceOrder(pooling="first").check_model(causal)
    SentenceOrder(pooling="last").check_model(causal)
    with pytest.raises(ConfigError, match="takes texts of other rows, and the data has one row only"):
        pairs(padded(documents([30])), 24, "next_sentence")
    with pytest.raises(ConfigError, match=r"batch\.seq_len=4 leaves no room for two texts and 3 marks"):
        pairs(rows, 4, "sentence_order")
    with pytest.raises(ConfigError, match="no document in the first rows has two tokens"):
        pairs(padded([[9], [EOS, 8]]), 24, "sentence_order")
    with pytest.raises(ConfigError, match="these rows are pairs already"):
        pairs(text_pairs(documents([9, 9, 8, 8])), 24, "sentence_order")
    with pytest.raises(ConfigError, match=r"--symbol '<sep>'"):
        pairs(rows, 24, "sentence_order", context={"eos_id": None})
    with pytest.raises(ConfigError, match=r"^objective\.masking\.mask_rate=0\.001 leaves no target"):
        pairs(rows, 24, "sentence_order", masking={"mask_rate": 0.001})
