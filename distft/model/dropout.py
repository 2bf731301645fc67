"""Dropout as a function of a key per row: its draws do not depend on how a batch is split.

The mask is a counter-based random number (`distft.keyed_random`), so a recomputed block draws the same again.

Shape letters: B rows, W width of the last dimension, L = ceil(W / 4) words of four 16-bit numbers.
"""

import torch
from torch import Tensor

from distft.keyed_random import GOLDEN, mix

_NOISE_SITE = 0x6E6F697365  # far from the sites of dropout, which count a model's layers
_MAX_WIDTH = 2**24  # positions in one row of the last dimension but one, for the counters


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


def embedding_noise(
    shape: tuple[int, int, int], alpha: float, keys_B: Tensor, lengths_B: Tensor | None
) -> Tensor:
    """float32 `shape` [B, T, C], uniform in +-alpha / sqrt(L * C), L the real tokens of the row.

    A row's numbers depend on its key and the place alone, as `dropout`'s. `lengths_B` None: all T are real.
    """
    num_rows, width, size = shape
    numbers = _random_16_bit(torch.Size(shape), keys_B, _NOISE_SITE)
    lengths_B = keys_B.new_full((num_rows,), width) if lengths_B is None else lengths_B.clamp_min(1)
    most_B = alpha * (lengths_B.float() * size) ** -0.5
    return (numbers.float() + 0.5) * (most_B / 32768)[:, None, None]


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
    keys = mix(keys_B + site).view(num_rows, *[1] * (len(shape) - 1))
    numbers = mix(keys + (counters ^ 0) * GOLDEN)
    return numbers.view(torch.int16)[..., :width]
