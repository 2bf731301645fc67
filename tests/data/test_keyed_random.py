"""Random numbers by key: uniform, independent, and functions of key, column and site alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.keyed_random import position_keys, row_keys, stream_seed, uniform

KEYS = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8)


@given(KEYS, st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_a_number_depends_on_key_column_and_site_alone(
    keys: list[int], width: int, narrower: int, site: int
) -> None:
    whole = uniform(torch.tensor(keys), width, site)
    assert whole.dtype == torch.float64
    assert bool(((whole >= 0) & (whole < 1)).all())
    for row, key in enumerate(keys):
        part = uniform(torch.tensor([key]), min(narrower, width), site)
        assert torch.equal(part[0], whole[row, : part.shape[1]])


def chi_squared(values: np.ndarray, num_cells: int) -> float:
    """Of uniform values: its mean is `num_cells` - 1, its standard deviation sqrt(2 (num_cells - 1))."""
    counts = np.bincount((values * num_cells).astype(int), minlength=num_cells)
    expected = len(values) / num_cells
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("seed", [0, 1, -5, 2**62])
def test_numbers_of_consecutive_sequences_columns_and_sites_are_uniform_and_uncorrelated(seed: int) -> None:
    keys = row_keys(seed, torch.arange(1000))
    numbers = uniform(keys, 64, 3).numpy()
    other_site, other_seed = (
        uniform(keys, 64, 4).numpy(),
        uniform(row_keys(seed + 1, torch.arange(1000)), 64, 3),
    )
    other_view = uniform(row_keys(seed, torch.arange(1000), view=1), 64, 3).numpy()
    # 5 standard deviations, in either direction.
    assert abs(chi_squared(numbers.ravel(), 256) - 255) < 5 * np.sqrt(2 * 255)
    for other in (
        other_site,
        other_seed.numpy(),
        other_view,
        np.roll(numbers, 1, axis=0),
        np.roll(numbers, 1, axis=1),
    ):
        correlation = np.corrcoef(numbers.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(numbers.size)
        pairs = (numbers.ravel() * 16).astype(int) * 16 + (other.ravel() * 16).astype(int)
        assert abs(chi_squared((pairs + 0.5) / 256, 256) - 255) < 5 * np.sqrt(2 * 255)


def test_positions_rows_and_streams_have_other_keys() -> None:
    keys = position_keys(row_keys(1, torch.arange(50)), 40)
    assert len(keys.unique()) == 50 * 40
    assert torch.equal(position_keys(row_keys(1, torch.arange(50)), 9), keys[:, :9])
    assert len({stream_seed(1, name) for name in ("a", "b", "text")}) == 3
    for seed in (0, 2**40, -(2**40)):  # fits into a signed 64-bit number, whatever the name
        assert row_keys(stream_seed(seed, "topic"), torch.arange(3)).dtype == torch.int64
