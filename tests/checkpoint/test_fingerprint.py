"""Fingerprints do not depend on how a parameter is cut, and change with any element."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distft.checkpoint.fingerprint import fingerprint


@given(
    values=st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_fingerprints_of_fragments_add_up_to_that_of_the_whole(
    values: list[float], dtype: torch.dtype, data: st.DataObject
) -> None:
    tensor = torch.tensor(values).to(dtype)
    cuts = sorted({0, len(values), *data.draw(st.lists(st.integers(0, len(values)), max_size=5))})
    total = sum(fingerprint(tensor[a:b], a) for a, b in pairwise(cuts))
    assert total % 2**64 == fingerprint(tensor, 0)


@given(numel=st.integers(1, 60), data=st.data())
def test_one_flipped_bit_or_two_swapped_values_change_the_fingerprint(
    numel: int, data: st.DataObject
) -> None:
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    before = fingerprint(tensor, 0)
    index, bit = data.draw(st.integers(0, numel - 1)), data.draw(st.integers(0, 31))
    damaged = tensor.clone()
    damaged.view(torch.int32)[index] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
    assert fingerprint(damaged, 0) != before
    if numel > 1:
        swapped = tensor.clone()
        swapped[[0, -1]] = swapped[[-1, 0]]
        assert fingerprint(swapped, 0) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
def test_a_fingerprint_is_the_sum_of_bits_times_odd_positions(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(-128, 128, (4 * 150_001,), generator=generator, dtype=torch.int8)
    values = raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    words = values.view({1: torch.int8, 2: torch.int16}.get(dtype.itemsize, torch.int32)).tolist()
    first = 7 * max(dtype.itemsize // 4, 1)
    expected = sum(bits * (2 * (first + i) + 1) for i, bits in enumerate(words))
    assert fingerprint(values, 7) == expected % 2**64
