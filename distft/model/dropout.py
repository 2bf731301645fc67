"""Dropout as a function of a key per row: its draws do not depend on how a batch is split.

The mask is a counter-based random number (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
here with the mixing function of splitmix64. No generator has a state, so nothing has to be saved, and a
recomputed block draws the same again.

Shape letters: B rows, W width of the last dimension, L = ceil(W / 4) words of four 16-bit numbers.
"""

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, odd, as a signed 64-bit number
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's factors
_MAX_WIDTH = 2**24  # positions in one row of the last dimension but one, for the counters


def row_keys(seed: int, sequence_numbers: Tensor) -> Tensor:
    """int64 [B]: one key for each sequence of the run's order."""
    return _mix(_mix(torch.full_like(sequence_numbers, seed)) + sequence_numbers)


def random_row_keys(num_rows: int, device: torch.device) -> Tensor:
    """Keys from torch's own generator, for models that are used outside of a run."""
    return torch.randint(-(2**63), 2**63 - 1, (num_rows,), device=device)


def dropout(x: Tensor, p: float, keys_B: Tensor, site: int) -> Tensor:
    """Drop each element of `x` [B, ..., W] with probability `p`, in steps of 1 / 65536, and scale the rest.

    An element's draw depends on its row's key, on `site` (the place in the model) and on its indices, but not
    on the sizes of `x`: padding a batch to another width changes no draw.
    """
    threshold = round(p * 65536)
    keep = _random_16_bit(x.shape, keys_B, site) >= threshold - 32768
    return torch.where(keep, x * (65536 / (65536 - threshold)), 0.0)


def _random_16_bit(shape: torch.Size, keys_B: Tensor, site: int) -> Tensor:
    """Uniform int16 numbers of `shape`; one 64-bit number makes four of them."""
    num_rows, *middle, width = shape
    device = keys_B.device
    # Inductor computes with a range as with indices: on a GPU in 32 bits, in which the factors below
    # overflow. `^ 0` makes numbers of them.
    counters = torch.arange(-(-width // 4), device=device) ^ 0
    for axis, size in enumerate(reversed(middle)):
        positions = (torch.arange(size, device=device) ^ 0).view(-1, *[1] * (axis + 1))
        counters = counters + positions * _MAX_WIDTH ** (axis + 1)
    keys = _mix(keys_B + site).view(num_rows, *[1] * (len(shape) - 1))
    numbers = _mix(keys + (counters ^ 0) * _GOLDEN)
    return numbers.view(torch.int16)[..., :width]


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer: every bit of the result depends on every bit of `z`."""
    z = (z ^ _shift_right(z, 30)) * _FIRST
    z = (z ^ _shift_right(z, 27)) * _SECOND
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
