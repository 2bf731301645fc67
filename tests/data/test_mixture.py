from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data.mixture import MixtureSampler, SequentialSampler
from distft.data.sampler import EpochSampler
from distft.data.shares import chairman_assignment, integer_shares
from distft.errors import ConfigError

WEIGHTS = st.lists(st.integers(1, 500).map(lambda n: n / 100), min_size=1, max_size=6)


@given(shares=st.lists(st.integers(1, 300), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_every_prefix_has_each_dataset_within_one_slot_of_its_share(shares: list[int]) -> None:
    slots = np.array(chairman_assignment(shares))
    period = sum(shares)
    assert len(slots) == period
    prefixes = np.arange(1, period + 1)
    for source, share in enumerate(shares):
        counts = np.cumsum(slots == source)
        assert (np.abs(counts * period - prefixes * share) < period).all()  # exact: whole numbers


@given(weights=WEIGHTS, start=st.integers(0, 10**12), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_counts_are_within_one_of_the_weights_share_at_any_point(
    weights: list[float], start: int, seed: int
) -> None:
    sampler = MixtureSampler([(10, weight) for weight in weights], seed)
    exact = [Fraction(str(weight)) for weight in weights]
    for stop in (start, start + 1, start + 77):
        counts = sampler.counts(stop)
        assert sum(counts) == stop
        for count, weight in zip(counts, exact, strict=True):
            assert abs(count - stop * weight / sum(exact)) < 1


@given(
    weights=WEIGHTS,
    start=st.integers(0, 10**9),
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_a_mixture_does_not_depend_on_the_ranges_it_is_looked_up_in(
    weights: list[float], start: int, lengths: list[int]
) -> None:
    sampler = MixtureSampler([(7 + 600 * i, weight) for i, weight in enumerate(weights)], 1)
    bounds = np.cumsum([start, *lengths]).tolist()
    ranges = [sampler.lookup(a, b) for a, b in pairwise(bounds)]
    whole = sampler.lookup(bounds[0], bounds[-1])
    for i in (0, 1):  # dataset ids, rows
        assert whole[i].dtype == np.int64
        assert np.array_equal(np.concatenate([found[i] for found in ranges]), whole[i])


def test_the_order_is_the_same_in_every_version_of_distft() -> None:
    """Golden values: if they change, runs resumed with this version read other sequences."""
    dataset_ids, rows = MixtureSampler([(10, 2.0), (3000, 1.0)], 7).lookup(0, 9)
    assert dataset_ids.tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 1]
    assert rows.tolist() == [9, 3, 1881, 1, 5, 2496, 0, 4, 2973]


def test_each_dataset_has_its_own_epochs() -> None:
    sampler = MixtureSampler([(5, 3.0), (2000, 1.0)], 0)
    dataset_ids, rows = sampler.lookup(0, 8000)
    small, large = rows[dataset_ids == 0], rows[dataset_ids == 1]
    epochs = small.reshape(-1, 5)
    assert (np.sort(epochs, axis=1) == np.arange(5)).all()
    assert len(np.unique(epochs, axis=0)) > 50
    assert np.array_equal(np.sort(large), np.arange(2000))


def test_datasets_of_equal_size_are_shuffled_differently() -> None:
    dataset_ids, rows = MixtureSampler([(500, 1.0), (500, 1.0)], 0).lookup(0, 1000)
    assert np.count_nonzero(rows[dataset_ids == 0] == rows[dataset_ids == 1]) < 10


def test_a_single_dataset_is_a_permutation_of_its_rows() -> None:
    dataset_ids, rows = MixtureSampler([(100, 0.3)], 4).lookup(0, 100)
    assert not dataset_ids.any()
    assert np.array_equal(np.sort(rows), np.arange(100))
    assert not np.array_equal(rows, np.arange(100))
    assert np.array_equal(MixtureSampler([(9, 1)], 4, shuffle=False).lookup(5, 20)[1],
                          EpochSampler(9, 0, shuffle=False).indices(5, 20))  # fmt: skip


@given(numerators=st.lists(st.integers(1, 99), min_size=1, max_size=5), digits=st.integers(0, 3))
def test_a_weight_means_its_decimal_notation(numerators: list[int], digits: int) -> None:
    shares = integer_shares([number / 10**digits for number in numerators])
    divisor = np.gcd.reduce(numerators)
    assert shares == [number // divisor for number in numerators]


def test_weights_in_exponent_notation_are_exact() -> None:
    assert integer_shares([1e-05, 0.99999]) == [1, 99999]


def test_weights_with_too_long_a_period_are_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match=r"0\.333333, 0\.666666, .* 1,000,000 .*round") as raised:
        integer_shares([0.333333, 0.666666, 1e-6])
    assert "100,000" in str(raised.value)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_not_a_number_above_zero_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="source 1"):
        integer_shares([1.0, bad])


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), data=st.data())
def test_the_sequential_sampler_reads_every_row_of_every_dataset_once(
    sizes: list[int], data: st.DataObject
) -> None:
    expected = [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    sampler = SequentialSampler(sizes)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    dataset_ids, rows = sampler.lookup(start, stop)
    assert (dataset_ids.dtype, rows.dtype) == (np.int64, np.int64)
    assert list(zip(dataset_ids.tolist(), rows.tolist(), strict=True)) == expected[start:stop]


def test_the_sequential_sampler_ends_with_the_last_row() -> None:
    for start, stop in ((8, 10), (-1, 1)):
        with pytest.raises(ValueError, match=rf"\[{start}, {stop}\) are outside the 9 "):
            SequentialSampler([2, 3, 4]).lookup(start, stop)
