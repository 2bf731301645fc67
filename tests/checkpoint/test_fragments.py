"""Interval arithmetic, and a fingerprint that does not depend on how a parameter is cut."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distft.checkpoint.fragments import Interval, cover, even_share, fingerprint


@given(numel=st.integers(1, 200), data=st.data())
def test_cover_serves_each_element_once_and_in_order(numel: int, data: st.DataObject) -> None:
    cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=6))})
    held = [Interval(a, b, i) for i, (a, b) in enumerate(pairwise(cuts))]
    # Overlapping copies by further holders must not serve anything twice.
    copies = data.draw(st.lists(st.tuples(st.integers(0, numel), st.integers(0, numel)), max_size=4))
    held += [Interval(min(c), max(c), 100 + i) for i, c in enumerate(copies)]
    start, stop = sorted((data.draw(st.integers(0, numel)), data.draw(st.integers(0, numel))))
    pieces = cover(start, stop, data.draw(st.permutations(held)))
    assert [e for piece in pieces for e in range(piece.start, piece.stop)] == list(range(start, stop))
    by_holder = {interval.holder: interval for interval in held}
    for piece in pieces:
        assert by_holder[piece.holder].start <= piece.start < piece.stop <= by_holder[piece.holder].stop


def test_cover_names_the_first_element_that_nobody_holds() -> None:
    with pytest.raises(ValueError, match=r"^4$"):
        cover(0, 10, [Interval(0, 4, 0), Interval(6, 10, 1)])
    with pytest.raises(ValueError, match=r"^8$"):
        cover(0, 10, [Interval(0, 8, 0)])


@given(numel=st.integers(0, 50), world_size=st.integers(1, 9))
def test_even_shares_partition_a_tensor(numel: int, world_size: int) -> None:
    shares = [even_share(numel, rank, world_size) for rank in range(world_size)]
    assert [e for start, stop in shares for e in range(start, stop)] == list(range(numel))


@given(
    values=st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=60),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_fingerprints_of_the_parts_add_up_to_that_of_the_whole(
    values: list[float], dtype: torch.dtype, data: st.DataObject
) -> None:
    tensor = torch.tensor(values).to(dtype)
    cuts = sorted({0, len(values), *data.draw(st.lists(st.integers(0, len(values)), max_size=5))})
    parts = sum(fingerprint(tensor[a:b], a) for a, b in pairwise(cuts))
    assert parts % 2**64 == fingerprint(tensor, 0)


@given(numel=st.integers(1, 60), data=st.data())
def test_one_flipped_bit_or_two_swapped_values_change_the_fingerprint(
    numel: int, data: st.DataObject
) -> None:
    tensor = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    before = fingerprint(tensor, 0)
    place, bit = data.draw(st.integers(0, numel - 1)), data.draw(st.integers(0, 31))
    damaged = tensor.clone()
    damaged.view(torch.int32)[place] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
    assert fingerprint(damaged, 0) != before
    if numel > 1:
        swapped = tensor.clone()
        swapped[[0, -1]] = swapped[[-1, 0]]
        assert fingerprint(swapped, 0) != before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
def test_a_fingerprint_is_the_sum_that_it_is_said_to_be(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(-128, 128, (4 * 150_001,), generator=generator, dtype=torch.int8)
    values = raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    words = values.view({1: torch.int8, 2: torch.int16}.get(dtype.itemsize, torch.int32)).tolist()
    first = 7 * max(dtype.itemsize // 4, 1)
    expected = sum(bits * (2 * (first + i) + 1) for i, bits in enumerate(words))
    assert fingerprint(values, 7) == expected % 2**64
