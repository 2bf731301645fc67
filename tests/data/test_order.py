from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distft.data.order import SequenceOrder

SIZES = st.one_of(st.integers(1, 50), st.integers(1, 5000), st.sampled_from([1023, 1024, 1025, 4096, 4097]))
SEEDS = st.integers(0, 2**63)


@given(num_sequences=SIZES, seed=SEEDS, epoch=st.integers(0, 2**40), shuffle=st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_epoch_reads_every_row_once(num_sequences: int, seed: int, epoch: int, shuffle: bool) -> None:
    start = epoch * num_sequences
    found = SequenceOrder(num_sequences, seed, shuffle=shuffle).indices(start, start + num_sequences)
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(num_sequences))


@given(
    num_sequences=st.one_of(SIZES, st.integers(1, 2**40)),
    seed=SEEDS,
    start=st.integers(0, 2**45),
    lengths=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    shuffle=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_the_order_does_not_depend_on_how_it_is_cut(
    num_sequences: int, seed: int, start: int, lengths: list[int], shuffle: bool
) -> None:
    order = SequenceOrder(num_sequences, seed, shuffle=shuffle)
    cuts = np.cumsum([start, *lengths]).tolist()
    pieces = [order.indices(a, b) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(pieces), order.indices(cuts[0], cuts[-1]))


@given(num_sequences=st.integers(1025, 2**40), seed=SEEDS, start=st.integers(0, 2**45))
@example(num_sequences=2**40, seed=0, start=2**40 - 50)
@settings(max_examples=50, deadline=None)
def test_rows_of_any_size_are_within_it_and_different_within_an_epoch(
    num_sequences: int, seed: int, start: int
) -> None:
    found = SequenceOrder(num_sequences, seed).indices(start, start + 100)
    assert found.min() >= 0
    assert found.max() < num_sequences
    epochs = (start + np.arange(100)) // num_sequences
    for epoch in np.unique(epochs):
        of_epoch = found[epochs == epoch]
        assert len(np.unique(of_epoch)) == len(of_epoch)


@pytest.mark.parametrize("num_sequences", [100, 1024, 1025, 100_000])
def test_epochs_and_seeds_differ_as_random_permutations_do(num_sequences: int) -> None:
    order = SequenceOrder(num_sequences, 7)
    first, second = order.indices(0, num_sequences), order.indices(num_sequences, 2 * num_sequences)
    other = SequenceOrder(num_sequences, 8).indices(0, num_sequences)
    in_file = np.arange(num_sequences)
    # Two random permutations agree in one place on average, and in more than 8 once in a million times.
    for a, b in ((first, second), (first, other), (first, in_file), (second, other)):
        assert np.count_nonzero(a == b) <= 8


@pytest.mark.parametrize("num_sequences", [2, 3, 4])
def test_every_order_of_a_few_rows_is_equally_likely(num_sequences: int) -> None:
    num_epochs = 24_000
    order = SequenceOrder(num_sequences, 3)
    epochs = order.indices(0, num_epochs * num_sequences).reshape(num_epochs, num_sequences)
    _, counts = np.unique(epochs, axis=0, return_counts=True)
    expected = num_epochs / {2: 2, 3: 6, 4: 24}[num_sequences]
    assert ((counts - expected) ** 2 / expected).sum() < 60  # 23 degrees: chance of 4e-5 at most
    assert len(counts) == {2: 2, 3: 6, 4: 24}[num_sequences]


@pytest.mark.parametrize("num_sequences", [60, 1025, 2048, 2049, 65_536])
def test_rows_are_spread_evenly_over_the_places_of_an_epoch(num_sequences: int) -> None:
    """Row by place, both in 16 parts, over many epochs: a chi-square with about 225 degrees of freedom."""
    num_epochs = max(1_000_000 // num_sequences, 1)
    order = SequenceOrder(num_sequences, 11)
    rows = order.indices(0, num_epochs * num_sequences)
    places = np.tile(np.arange(num_sequences), num_epochs)
    table = np.histogram2d(places, rows, bins=16, range=[[0, num_sequences]] * 2)[0]
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 350  # 225 expected, deviation 21: six of them


@pytest.mark.parametrize("num_sequences", [1025, 2048, 100_003])
def test_neighbours_in_the_file_are_no_neighbours_in_the_order(num_sequences: int) -> None:
    rows = SequenceOrder(num_sequences, 5).indices(0, num_sequences)
    steps = (np.diff(rows) % num_sequences) * 16 // num_sequences
    counts = np.bincount(steps, minlength=16)
    expected = (num_sequences - 1) / 16
    assert ((counts - expected) ** 2 / expected).sum() < 60  # 15 degrees of freedom


def test_without_shuffling_rows_come_as_in_the_file_again_and_again() -> None:
    found = SequenceOrder(5, 1, shuffle=False).indices(3, 14)
    assert found.tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_an_order_is_the_same_in_every_version_of_this_program() -> None:
    """Golden: a resumed run must see what it would have seen; changing these numbers breaks every run."""
    assert SequenceOrder(10, 0).indices(0, 10).tolist() == [9, 4, 3, 2, 0, 7, 1, 5, 8, 6]
    later = SequenceOrder(10**6, 0).indices(10**6, 10**6 + 5)
    assert later.tolist() == [770321, 398604, 541499, 854475, 251178]
