"""Masked language modelling: which tokens are masked, by what, and the loss of predicting them."""

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
    PAD,
    UNK,
    data_context,
    documents,
    feed,
    packed,
    padded,
    transform_context,
)
from torch.nn.functional import cross_entropy

from distft.collectives import SingleProcess
from distft.config import parse
from distft.data.batch import Batch
from distft.data.feed import Feed
from distft.data.masking import draw_units
from distft.data.targets import IGNORE_INDEX, MASKED_TOKEN
from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import ObjectiveContext
from distft.objective.masked_lm import MaskedLM
from distft.objective.settings import ObjectiveConfig

CONTEXT = ObjectiveContext(40, SingleProcess())


def masked(rows: Any, seq_len: int, seed: int = 7, **changes: Any) -> Feed:
    context = data_context(seq_len, **changes.pop("context", {}))
    objective = parse(ObjectiveConfig, {"type": "masked_lm", **changes})
    result = objective.transform_feed(feed(rows), context, seed)
    assert isinstance(result, Feed)
    return result


def long_rows(seq_len: int = 64, num_rows: int = 40) -> Any:
    return packed(documents([seq_len // 3] * 4 * num_rows), seq_len)


def shares(batch: Batch, original: Batch) -> dict[str, float]:
    """Of the targets: how many are the mask token, their own token, and another one."""
    is_target = batch.targets[MASKED_TOKEN] != IGNORE_INDEX
    shown, labels = batch.input_ids[is_target], batch.targets[MASKED_TOKEN][is_target]
    assert torch.equal(labels, original.input_ids[is_target])
    assert torch.equal(batch.input_ids[~is_target], original.input_ids[~is_target])
    return {
        "mask": (shown == MASK).double().mean().item(),
        "kept": (shown == labels).double().mean().item(),
        "other": ((shown != MASK) & (shown != labels)).double().mean().item(),
    }


@given(cuts=st.lists(st.integers(0, 9), max_size=3), kind=st.sampled_from(["tokens", "words", "spans"]))
@settings(max_examples=20, deadline=None)
def test_masks_are_a_function_of_seed_and_sequence_number(cuts: list[int], kind: str) -> None:
    rows = padded(documents([5, 30, 17, 11, 23, 8, 9]))
    whole = masked(rows, 32, masked=kind).batch(3, 12)
    for start, stop in pairwise(sorted({0, 9, *cuts})):
        part = masked(rows, 32, masked=kind).batch(3 + start, 3 + stop)
        width = part.input_ids.shape[1]
        assert torch.equal(part.input_ids, whole.input_ids[start:stop, :width])
        assert torch.equal(part.targets[MASKED_TOKEN], whole.targets[MASKED_TOKEN][start:stop, :width])
    assert not torch.equal(masked(rows, 32, seed=8, masked=kind).batch(3, 12).input_ids, whole.input_ids)
    first_epoch, second_epoch = (
        masked(padded(documents([31])), 32, masked=kind).batch(n, n + 1) for n in (0, 1)
    )
    assert not torch.equal(first_epoch.targets[MASKED_TOKEN], second_epoch.targets[MASKED_TOKEN])


@given(
    starts=st.lists(st.booleans(), min_size=24, max_size=24),
    counts=st.lists(st.booleans(), min_size=24, max_size=24),
    rate=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
)
def test_units_are_drawn_whole_in_order_of_their_priority(
    starts: list[bool], counts: list[bool], rate: float, seed: int
) -> None:
    unit_starts, is_counted = (np.array(values).reshape(2, 12) for values in (starts, counts))
    unit_starts[:, 0] = True
    random = np.random.default_rng(seed)
    priorities, rounding = random.random((2, 12)), random.random(2)
    found = draw_units(unit_starts, is_counted, rate, priorities=priorities, rounding=rounding)
    for row in range(2):
        bounds = [*np.flatnonzero(unit_starts[row]).tolist(), 12]
        units = sorted(pairwise(bounds), key=lambda unit: priorities[row, unit[0]])
        expected, taken = np.zeros(12, bool), 0
        budget = rate * is_counted[row].sum()
        for start, stop in units:
            size = int(is_counted[row, start:stop].sum())
            taken += size
            # The unit that crosses the budget is in with the share of it that is below.
            expected[start:stop] = is_counted[row, start:stop] & (taken - size * rounding[row] <= budget)
        assert found[row].tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["tokens", "words", "spans"])
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_the_share_of_targets_is_the_mask_rate_on_average(kind: str, rate: float) -> None:
    batch = masked(long_rows(), 64, masked=kind, mask_rate=rate).batch(0, 2000)
    original = feed(long_rows()).batch(0, 2000).input_ids
    num_text = int((original >= FIRST_TEXT_ID).sum())
    assert batch.num_targets[MASKED_TOKEN] / num_text == pytest.approx(rate, abs=0.004)
    assert batch.num_targets[MASKED_TOKEN] == int((batch.targets[MASKED_TOKEN] != IGNORE_INDEX).sum())
    # Special ids are never masked, nor is padding.
    assert not (batch.targets[MASKED_TOKEN][original < FIRST_TEXT_ID] != IGNORE_INDEX).any()


def test_targets_are_replaced_by_shares() -> None:
    rows = long_rows()
    original = feed(rows).batch(0, 2000)
    # One text id in 35 is drawn where it was.
    found = shares(masked(rows, 64, mask_rate=0.2).batch(0, 2000), original)
    assert found == pytest.approx({"mask": 0.8, "kept": 0.1 + 0.1 / 35, "other": 0.1 * 34 / 35}, abs=0.01)
    all_masked = masked(rows, 64, mask_token_share=1.0, random_token_share=0.0).batch(0, 50)
    assert shares(all_masked, feed(rows).batch(0, 50)) == {"mask": 1.0, "kept": 0.0, "other": 0.0}
    random = masked(rows, 64, mask_rate=1.0, mask_token_share=0.0, random_token_share=1.0).batch(0, 50)
    assert ((random.input_ids >= FIRST_TEXT_ID) == (feed(rows).batch(0, 50).input_ids >= FIRST_TEXT_ID)).all()
    counts = torch.bincount(random.input_ids.flatten(), minlength=40)[FIRST_TEXT_ID:].double()
    assert (counts / counts.mean() - 1).abs().max() < 0.4  # 91 of each are expected


def test_words_are_masked_whole() -> None:
    rows = long_rows()
    batch, original = masked(rows, 64, masked="words").batch(0, 60), feed(rows).batch(0, 60)
    assert original.document_ids is not None
    num_words = 0
    for ids, document, is_target in zip(
        original.input_ids.tolist(),
        original.document_ids.tolist(),
        (batch.targets[MASKED_TOKEN] != IGNORE_INDEX).tolist(),
        strict=True,
    ):
        for place in range(1, len(ids)):
            same_word = (
                ids[place] >= FIRST_TEXT_ID and ids[place] % 2 == 1 and ids[place - 1] >= FIRST_TEXT_ID
            )
            if same_word and document[place] == document[place - 1]:
                assert is_target[place] == is_target[place - 1]
                num_words += is_target[place]
    assert num_words > 100


def test_spans_have_the_mean_length_and_are_replaced_alike() -> None:
    rows = packed(documents([1024 * 40]), 1024)
    batch = masked(rows, 1024, masked="spans", mean_span_length=4.0, mask_rate=0.15).batch(0, 40)
    is_target = batch.targets[MASKED_TOKEN].numpy() != IGNORE_INDEX
    lengths = [
        stop - start
        for row in is_target
        for start, stop in np.flatnonzero(np.diff(np.concatenate([[0], row, [0]]))).reshape(-1, 2)
    ]
    # 15 % of them are followed by another one at once.
    assert np.mean(lengths) == pytest.approx(4.0 / 0.85, abs=0.35)
    is_mask = batch.input_ids.numpy() == MASK
    num_alike = [(is_mask[:, 1:] == is_mask[:, :-1])[is_target[:, 1:] & is_target[:, :-1]].mean()]
    assert np.mean(num_alike) > 0.97


def test_a_row_without_text_and_an_empty_range_have_no_targets() -> None:
    rows = padded([[EOS] * 9, *documents([30, 30])])
    labels = masked(rows, 32, mask_rate=1.0).batch(0, 3).targets[MASKED_TOKEN]
    assert sorted((labels != IGNORE_INDEX).sum(dim=1).tolist()) == [0, 30, 30]
    empty = masked(long_rows(), 64).batch(2, 2)
    assert empty.num_targets == {MASKED_TOKEN: 0}
    assert (empty.targets[MASKED_TOKEN] == IGNORE_INDEX).all()


def test_loss_gradient_and_metrics_equal_those_computed_from_all_logits() -> None:
    objective = MaskedLM(label_smoothing=0.1)
    config = TransformerConfig(
        **{**SIZES, "vocab_size": 40, "max_seq_len": 64}, attention="bidirectional", pad_vocab_to=64
    )
    model = build(config, objective.heads(None))
    batch = masked(long_rows(), 64).batch(0, 6)
    labels, inputs = batch.targets[MASKED_TOKEN], batch.model_inputs
    objective.loss_sums(model, batch, CONTEXT)[MASKED_TOKEN].backward()
    gradients = [param.grad for param in model.parameters()]
    model.zero_grad()
    logits = model.logits(**inputs)[..., :40]
    cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1, reduction="sum").backward()
    for gradient, param in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, param.grad, rtol=1e-4, atol=1e-4)
    found = objective.metrics(objective.evaluate(model, batch, CONTEXT))
    counts = labels != IGNORE_INDEX
    loss = cross_entropy(logits[counts].double(), labels[counts]).item()
    accuracy = (logits[counts].argmax(dim=1) == labels[counts]).double().mean().item()
    assert found == pytest.approx({"loss": loss, "perplexity": np.exp(loss), "accuracy": accuracy}, rel=1e-6)


def test_the_loss_is_that_of_transformers() -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    bert = BertForMaskedLM(
        BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    ).eval()
    batch = masked(long_rows(), 64).batch(0, 5)
    expected = bert(input_ids=batch.input_ids, labels=batch.targets[MASKED_TOKEN])

    def model(*, losses_from_hidden: Any, **_: Any) -> dict[str, torch.Tensor]:
        # The logits as hidden states, and the identity as the head's weight.
        return {"lm_head": losses_from_hidden["lm_head"](expected.logits.flatten(0, 1), torch.eye(40))}

    loss = MaskedLM().loss_sums(model, batch, CONTEXT)[MASKED_TOKEN] / batch.num_targets[MASKED_TOKEN]
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-6)


def test_bad_settings_models_tokenizers_and_data_are_clear_errors() -> None:
    rows = long_rows()
    with pytest.raises(ConfigError, match=r"add up to 1.1"):
        parse(ObjectiveConfig, {"type": "masked_lm", "random_token_share": 0.3})
    with pytest.raises(ConfigError, match="both 0"):
        parse(ObjectiveConfig, {"type": "masked_lm", "mask_token_share": 0, "random_token_share": 0})
    with pytest.raises(ConfigError, match="mean_span_length=2 has no effect with masked: tokens"):
        parse(ObjectiveConfig, {"type": "masked_lm", "mean_span_length": 2})
    with pytest.raises(ConfigError, match=r"model\.attention=causal with objective\.type=masked_lm"):
        MaskedLM().check_model(TransformerConfig(**SIZES))
    with pytest.raises(
        ConfigError, match=r"mask_rate=0\.001 leaves no target: a step of 8 rows has about 48"
    ):
        masked(rows, 64, mask_rate=0.001)
    with pytest.raises(ConfigError, match=r"leaves no target: a step of 8 rows has about 0 tokens"):
        masked(padded([[EOS], [PAD, EOS]]), 64)
    with pytest.raises(ConfigError, match=r"--symbol '<mask>'"):
        masked(rows, 64, context={"pieces": {}, "unk_id": None})
    with pytest.raises(ConfigError, match=r"objective\.masked=words: no piece"):
        masked(rows, 64, masked="words", context={"starts_word": np.arange(40) < FIRST_TEXT_ID})


def test_without_a_mask_piece_the_unknown_token_is_the_mask_and_the_log_says_so() -> None:
    rows = long_rows()
    by_unknown = masked(
        rows, 64, mask_rate=1.0, mask_token_share=1.0, random_token_share=0.0, context={"pieces": {}}
    )
    assert set(by_unknown.batch(0, 5).input_ids.unique().tolist()) <= {UNK, EOS, MASK}
    assert "become the unknown token, id 0" in by_unknown.summary
    assert "unknown" not in masked(rows, 64).summary
    assert transform_context(feed(rows), data_context(64)).num_sequences == rows.num_sequences
