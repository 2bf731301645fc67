from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distft.data.sampler import EpochSampler

SIZES = st.one_of(st.integers(1, 50), st.integers(1, 5000), st.sampled_from([1023, 1024, 1025, 4096, 4097]))
SEEDS = st.integers(0, 2**63)


@given(num_sequences=SIZES, seed=SEEDS, epoch=st.integers(0, 2**40), shuffle=st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_epoch_reads_every_row_once(num_sequences: int, seed: int, epoch: int, shuffle: bool) -> None:
    start = epoch * num_sequences
    found = EpochSampler(num_sequences, seed, shuffle=shuffle).indices(start, start + num_sequences)
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
def test_the_order_does_not_depend_on_the_ranges_it_is_read_in(
    num_sequences: int, seed: int, start: int, lengths: list[int], shuffle: bool
) -> None:
    sampler = EpochSampler(num_sequences, seed, shuffle=shuffle)
    bounds = np.cumsum([start, *lengths]).tolist()
    ranges = [sampler.indices(a, b) for a, b in pairwise(bounds)]
    assert np.array_equal(np.concatenate(ranges), sampler.indices(bounds[0], bounds[-1]))


@pytest.mark.parametrize("num_sequences", [2, 1024, 1025, 3000])
def test_a_range_may_end_with_the_first_row_of_an_epoch_or_begin_with_the_last(num_sequences: int) -> None:
    sampler = EpochSampler(num_sequences, 3)
    for end in range(num_sequences, 9 * num_sequences, num_sequences):
        whole = sampler.indices(end - num_sequences, end + num_sequences)
        across = sampler.indices(end - 1, end + 1)
        assert across.tolist() == whole[num_sequences - 1 : num_sequences + 1].tolist()


@given(num_sequences=st.integers(1025, 2**40), seed=SEEDS, start=st.integers(0, 2**45))
@example(num_sequences=2**40, seed=0, start=2**40 - 50)
@settings(max_examples=50, deadline=None)
def test_rows_are_in_range_and_distinct_within_an_epoch(num_sequences: int, seed: int, start: int) -> None:
    found = EpochSampler(num_sequences, seed).indices(start, start + 100)
    assert found.min() >= 0
    assert found.max() < num_sequences
    epochs = (start + np.arange(100)) // num_sequences
    for epoch in np.unique(epochs):
        of_epoch = found[epochs == epoch]
        assert len(np.unique(of_epoch)) == len(of_epoch)


@pytest.mark.parametrize("num_sequences", [100, 1024, 1025, 100_000])
def test_epochs_and_seeds_give_unrelated_permutations(num_sequences: int) -> None:
    sampler = EpochSampler(num_sequences, 7)
    first, second = sampler.indices(0, num_sequences), sampler.indices(num_sequences, 2 * num_sequences)
    other = EpochSampler(num_sequences, 8).indices(0, num_sequences)
    in_file = np.arange(num_sequences)
    # Two random permutations agree in one place on average, and in more than 8 once in a million times.
    for a, b in ((first, second), (first, other), (first, in_file), (second, other)):
        assert np.count_nonzero(a == b) <= 8


@pytest.mark.parametrize("num_sequences", [2, 3, 4])
def test_every_order_of_a_few_rows_is_equally_likely(num_sequences: int) -> None:
    num_epochs = 24_000
    sampler = EpochSampler(num_sequences, 3)
    epochs = sampler.indices(0, num_epochs * num_sequences).reshape(num_epochs, num_sequences)
    _, counts = np.unique(epochs, axis=0, return_counts=True)
    expected = num_epochs / {2: 2, 3: 6, 4: 24}[num_sequences]
    assert ((counts - expected) ** 2 / expected).sum() < 60  # 23 degrees: chance of 4e-5 at most
    assert len(counts) == {2: 2, 3: 6, 4: 24}[num_sequences]


@pytest.mark.parametrize("num_sequences", [60, 1025, 2048, 2049, 65_536])
def test_rows_are_uniform_over_the_positions_of_an_epoch(num_sequences: int) -> None:
    """Chi-square of row against position, each in 16 bins: about 225 degrees of freedom."""
    num_epochs = max(1_000_000 // num_sequences, 1)
    sampler = EpochSampler(num_sequences, 11)
    rows = sampler.indices(0, num_epochs * num_sequences)
    positions = np.tile(np.arange(num_sequences), num_epochs)
    table = np.histogram2d(positions, rows, bins=16, range=[[0, num_sequences]] * 2)[0]
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 350  # 225 expected, deviation 21: six of them


@pytest.mark.parametrize("num_sequences", [1025, 2048, 100_003])
def test_distances_between_consecutive_rows_are_uniform(num_sequences: int) -> None:
    rows = EpochSampler(num_sequences, 5).indices(0, num_sequences)
    steps = (np.diff(rows) % num_sequences) * 16 // num_sequences
    counts = np.bincount(steps, minlength=16)
    expected = (num_sequences - 1) / 16
    assert ((counts - expected) ** 2 / expected).sum() < 60  # 15 degrees of freedom


def test_without_shuffling_every_epoch_is_in_file_order() -> None:
    found = EpochSampler(5, 1, shuffle=False).indices(3, 14)
    assert found.tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_the_order_is_the_same_in_every_version_of_distft() -> None:
    """Golden values: if they change, runs resumed with this version read other sequences."""
    assert EpochSampler(10, 0).indices(0, 10).tolist() == [9, 4, 3, 2, 0, 7, 1, 5, 8, 6]
    later = EpochSampler(10**6, 0).indices(10**6, 10**6 + 5)
    assert later.tolist() == [770321, 398604, 541499, 854475, 251178]
    # Powers of two, and one less: where a wrong number of bits would show.
    assert EpochSampler(2048, 0).indices(2048, 2053).tolist() == [1510, 1248, 63, 136, 1760]
    assert EpochSampler(2047, 0).indices(2047, 2052).tolist() == [1510, 1248, 63, 136, 1760]
