"""Random numbers as a function of a key per row: they do not depend on how a batch is split.

Counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), here with the mixing
function of splitmix64. No generator has a state, so nothing has to be saved: a resume draws the same again.

Shape letters: B rows, W numbers per row.
"""

import zlib

import torch
from torch import Tensor

GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, odd, as a signed 64-bit number
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # splitmix64's factors


def row_keys(seed: int, sequence_numbers: Tensor, view: int = 0) -> Tensor:
    """int64 [B]: one key for each sequence of the run's order, and for each `view` of it another one."""
    keys = mix(mix(torch.full_like(sequence_numbers, seed)) + sequence_numbers)
    return mix(keys + view) if view else keys


def stream_seed(seed: int, name: str) -> int:
    """The seed of one of several data streams: sequences of equal number in two get other random numbers."""
    return seed + (zlib.crc32(name.encode()) << 30)


def position_keys(keys_B: Tensor, width: int) -> Tensor:
    """int64 [B, W]: another key for each position of each row."""
    return mix(keys_B[:, None] + torch.arange(1, width + 1, device=keys_B.device) * GOLDEN)


def uniform(keys_B: Tensor, width: int, site: int) -> Tensor:
    """float64 [B, W] in [0, 1). A number depends on its row's key, its column and `site`, its use."""
    counters = torch.arange(width, device=keys_B.device)
    numbers = mix(mix(keys_B + site)[:, None] + counters * GOLDEN)
    return _shift_right(numbers, 11).double() * 2.0**-53


def mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer: every bit of the result depends on every bit of `z`."""
    z = (z ^ _shift_right(z, 30)) * _FIRST
    z = (z ^ _shift_right(z, 27)) * _SECOND
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
