from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data.mixture import FileOrder, MixtureOrder, chairman_assignment, whole_shares
from distft.data.order import SequenceOrder
from distft.errors import ConfigError

WEIGHTS = st.lists(st.integers(1, 500).map(lambda n: n / 100), min_size=1, max_size=6)


@given(shares=st.lists(st.integers(1, 300), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_every_source_is_within_one_slot_of_its_share_at_every_prefix(shares: list[int]) -> None:
    slots = np.array(chairman_assignment(shares))
    period = sum(shares)
    assert len(slots) == period
    prefixes = np.arange(1, period + 1)
    for source, share in enumerate(shares):
        counts = np.cumsum(slots == source)
        assert (np.abs(counts * period - prefixes * share) < period).all()  # exact: whole numbers


@given(weights=WEIGHTS, start=st.integers(0, 10**12), seed=st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_counts_follow_the_weights_exactly_however_far_the_run_is(
    weights: list[float], start: int, seed: int
) -> None:
    order = MixtureOrder([(10, weight) for weight in weights], seed)
    exact = [Fraction(str(weight)) for weight in weights]
    for stop in (start, start + 1, start + 77):
        counts = order.counts(stop)
        assert sum(counts) == stop
        for count, weight in zip(counts, exact, strict=True):
            assert abs(count - stop * weight / sum(exact)) < 1


@given(
    weights=WEIGHTS,
    start=st.integers(0, 10**9),
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_a_mixture_does_not_depend_on_how_it_is_cut(
    weights: list[float], start: int, lengths: list[int]
) -> None:
    order = MixtureOrder([(7 + 600 * i, weight) for i, weight in enumerate(weights)], 1)
    cuts = np.cumsum([start, *lengths]).tolist()
    pieces = [order.locate(a, b) for a, b in pairwise(cuts)]
    whole = order.locate(cuts[0], cuts[-1])
    for part in (0, 1):
        assert np.array_equal(np.concatenate([piece[part] for piece in pieces]), whole[part])


def test_each_source_goes_through_its_own_epochs_at_its_own_pace() -> None:
    order = MixtureOrder([(5, 3.0), (2000, 1.0)], 0)
    source_ids, rows = order.locate(0, 8000)
    small, large = rows[source_ids == 0], rows[source_ids == 1]
    epochs = small.reshape(-1, 5)
    assert (np.sort(epochs, axis=1) == np.arange(5)).all()
    assert len(np.unique(epochs, axis=0)) > 50
    assert np.array_equal(np.sort(large), np.arange(2000))


def test_sources_of_the_same_size_have_different_orders() -> None:
    source_ids, rows = MixtureOrder([(500, 1.0), (500, 1.0)], 0).locate(0, 1000)
    assert np.count_nonzero(rows[source_ids == 0] == rows[source_ids == 1]) < 10


def test_one_source_alone_is_in_an_order_of_its_rows() -> None:
    source_ids, rows = MixtureOrder([(100, 0.3)], 4).locate(0, 100)
    assert not source_ids.any()
    assert np.array_equal(np.sort(rows), np.arange(100))
    assert not np.array_equal(rows, np.arange(100))
    assert np.array_equal(MixtureOrder([(9, 1)], 4, shuffle=False).locate(5, 20)[1],
                          SequenceOrder(9, 0, shuffle=False).indices(5, 20))  # fmt: skip


@given(numerators=st.lists(st.integers(1, 99), min_size=1, max_size=5), digits=st.integers(0, 3))
def test_weights_are_taken_as_the_decimals_that_they_print_as(numerators: list[int], digits: int) -> None:
    shares = whole_shares([number / 10**digits for number in numerators])
    divisor = np.gcd.reduce(numerators)
    assert shares == [number // divisor for number in numerators]


def test_weights_in_exponent_notation_are_exact() -> None:
    assert whole_shares([1e-05, 0.99999]) == [1, 99999]


def test_weights_that_repeat_too_late_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"0\.333333, 0\.666666, .* 1,000,000 .*round") as raised:
        whole_shares([0.333333, 0.666666, 1e-6])
    assert "100,000" in str(raised.value)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_number_above_zero_is_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="source 1"):
        whole_shares([1.0, bad])


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5), data=st.data())
def test_file_order_reads_every_row_of_every_source_once(sizes: list[int], data: st.DataObject) -> None:
    expected = [(source, row) for source, size in enumerate(sizes) for row in range(size)]
    order = FileOrder(sizes)
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    source_ids, rows = order.locate(start, stop)
    assert list(zip(source_ids.tolist(), rows.tolist(), strict=True)) == expected[start:stop]


def test_file_order_ends_with_the_last_row() -> None:
    with pytest.raises(ValueError, match="5"):
        FileOrder([2, 3]).locate(4, 6)
