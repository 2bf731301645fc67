"""Dropout by keys: a row's draws depend on its key and place alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import SIZES, build

from distft.keyed_random import row_keys
from distft.model.dropout import dropout
from distft.model.transformer_config import TransformerConfig

ROWS = torch.arange(4)


def random_ids(num_rows: int, num_positions: int) -> torch.Tensor:
    return torch.randint(0, 61, (num_rows, num_positions), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_dropped_with_the_given_probability_and_the_mean_is_kept(p: float) -> None:
    x = torch.ones(4, 100, 250)
    kept = dropout(x, p, row_keys(1, ROWS), site=0)
    num = x.numel()
    assert int((kept == 0).sum()) / num == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / num))
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02 * math.sqrt(p / (1 - p)) + 0.01)
    assert kept[kept > 0].unique().tolist() == [pytest.approx(1 / (1 - p), rel=1e-4)]


@given(start=st.integers(0, 3), stop=st.integers(1, 4), width=st.integers(1, 9), height=st.integers(1, 7))
def test_neither_other_rows_nor_padding_change_draws(start: int, stop: int, width: int, height: int) -> None:
    keys = row_keys(5, ROWS)
    whole = dropout(torch.ones(4, 7, 9), 0.5, keys, site=3)
    part = dropout(torch.ones(4, height, width)[start:stop], 0.5, keys[start:stop], site=3)
    assert torch.equal(part, whole[start:stop, :height, :width])


@pytest.mark.parametrize("other", ["row", "site", "seed"])
def test_rows_sites_and_seeds_draw_independently(other: str) -> None:
    ones = torch.ones(1, 64, 64)
    first = dropout(ones, 0.5, row_keys(0, torch.tensor([7])), site=1)
    seed, number, site = {"row": (0, 8, 1), "site": (0, 7, 2), "seed": (1, 7, 1)}[other]
    second = dropout(ones, 0.5, row_keys(seed, torch.tensor([number])), site=site)
    agreement = (first == second).float().mean().item()
    assert agreement == pytest.approx(0.5, abs=4 * 0.5 / 64)


def test_neighbouring_elements_are_uncorrelated() -> None:
    bits = (dropout(torch.ones(4, 128, 128), 0.5, row_keys(2, ROWS), site=0) > 0).float() - 0.5
    for shift in ((0, 1), (0, 2), (0, 4), (1, 0), (2, 0)):
        product = bits * bits.roll(shift, dims=(1, 2))
        assert abs(product.mean().item()) < 4 * 0.25 / math.sqrt(bits.numel())


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_row_gives_the_same_logits_in_every_batch(attention: str) -> None:
    model = build(TransformerConfig.model_validate({**SIZES, "attention": attention, "dropout": 0.4})).train()
    ids, keys = random_ids(4, 10), row_keys(0, ROWS)
    together = model.logits(ids, dropout_keys=keys)
    alone = [model.logits(ids[i : i + 1], dropout_keys=keys[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(torch.cat(alone), together)
    assert not torch.allclose(together[0], model.logits(ids[:1], dropout_keys=keys[1:2])[0], atol=0.1)


def test_without_dropping_attention_written_out_equals_the_kernel() -> None:
    model = build(
        TransformerConfig(**SIZES, num_kv_heads=2, dropout=1e-9)
    ).train()  # rounds to nothing dropped
    ids = random_ids(2, 12)
    torch.testing.assert_close(model.logits(ids), model.eval().logits(ids), rtol=1e-4, atol=1e-5)
