"""Stateless shuffling: the row of every sequence number, computed from the seed and the epoch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_UInt64Array = NDArray[np.uint64]

# Rows; up to here an epoch is an argsort of random keys (8 KB), in which every order is equally likely.
_MAX_ARGSORT_ROWS = 1024
_NUM_ROUNDS = 8
_CHUNK = 1 << 15  # indices per pass: each array takes 256 KB and stays in the processor's cache
_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # increment and multipliers of splitmix64 (Steele et al., 2014)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


class EpochSampler:
    """Maps sequence number `i` to a row, over infinitely many epochs of `num_sequences` rows.

    Epoch `i // num_sequences` is a pseudo-random permutation of the rows, a function of the seed and the
    epoch. Any rank can compute any range in O(1) memory per index, and there is no state to save. With
    `shuffle=False` every epoch is in file order.
    """

    def __init__(self, num_sequences: int, seed: int, *, shuffle: bool = True) -> None:
        if num_sequences < 1:
            raise ValueError(f"num_sequences={num_sequences}: a sampler needs at least one row.")
        self.num_sequences = num_sequences
        self._shuffle = shuffle
        self._key = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]

    def indices(self, start: int, stop: int) -> Indices:
        """Rows of sequences [start, stop), each in [0, num_sequences)."""
        if stop <= start:
            return np.empty(0, np.int64)
        if not self._shuffle or self.num_sequences == 1:
            offset = start % self.num_sequences
            return np.arange(offset, offset + stop - start, dtype=np.int64) % self.num_sequences
        if self.num_sequences <= _MAX_ARGSORT_ROWS:
            return self._argsort_permutations(start, stop)
        return self._feistel_permutations(start, stop)

    def _epoch_keys(self, first: int, last: int) -> _UInt64Array:
        """A random key for each of the epochs [first, last]."""
        epochs = np.arange(last - first + 1, dtype=np.uint64) + np.uint64(first)
        return _splitmix64(_splitmix64(epochs * _GOLDEN_GAMMA) ^ self._key)

    def _argsort_permutations(self, start: int, stop: int) -> Indices:
        first, last = start // self.num_sequences, (stop - 1) // self.num_sequences
        rows = np.arange(1, self.num_sequences + 1, dtype=np.uint64) * _GOLDEN_GAMMA
        keys = _splitmix64(self._epoch_keys(first, last)[:, None] + rows)
        order = np.argsort(keys, axis=1, kind="stable").reshape(-1)
        offset = first * self.num_sequences
        return order[start - offset : stop - offset].astype(np.int64)

    def _feistel_permutations(self, start: int, stop: int) -> Indices:
        first, last = start // self.num_sequences, (stop - 1) // self.num_sequences
        rows = np.empty(stop - start, np.int64)
        for epoch, key in enumerate(self._epoch_keys(first, last), start=first):
            offset = epoch * self.num_sequences
            lower, upper = max(start, offset), min(stop, offset + self.num_sequences)
            for begin in range(lower, upper, _CHUNK):
                end = min(begin + _CHUNK, upper)
                positions = np.arange(begin - offset, end - offset, dtype=np.uint64)
                rows[begin - start : end - start] = _permute(positions, self.num_sequences, key)
        return rows


def _permute(positions: _UInt64Array, size: int, key: Any) -> _UInt64Array:
    """Images of `positions` under the permutation of range(size) that `key` selects.

    A Feistel network permutes the numbers of just enough bits; results at or above `size` are encrypted
    again until they fall below it (cycle walking). That takes at most two encryptions per value on average.
    """
    num_bits = (size - 1).bit_length()
    round_keys = _splitmix64(np.arange(1, _NUM_ROUNDS + 1, dtype=np.uint64) * _GOLDEN_GAMMA + key)
    limit = np.uint64(size)
    values = _feistel(positions, num_bits, round_keys)
    outside = np.flatnonzero(values >= limit)
    while outside.size:
        values[outside] = _feistel(values[outside], num_bits, round_keys)
        outside = outside[values[outside] >= limit]
    return values


def _feistel(values: _UInt64Array, num_bits: int, round_keys: _UInt64Array) -> _UInt64Array:
    """A bijection on numbers of `num_bits` bits: each round xors one half with a hash of the other."""
    low_bits = num_bits // 2
    high_bits = num_bits - low_bits
    low = values & np.uint64((1 << low_bits) - 1)
    high = values >> np.uint64(low_bits)
    for i, key in enumerate(round_keys):
        if i % 2:
            low ^= _round_function(high, key, low_bits)
        else:
            high ^= _round_function(low, key, high_bits)
    high <<= np.uint64(low_bits)
    high |= low
    return high


def _round_function(values: _UInt64Array, key: Any, num_bits: int) -> _UInt64Array:
    """Hash each value to `num_bits` bits: the top ones, which are the best mixed."""
    word: _UInt64Array = values ^ key
    word *= _MULTIPLIER_1
    word ^= word >> np.uint64(32)
    word *= _MULTIPLIER_2
    word >>= np.uint64(64 - num_bits)
    return word


def _splitmix64(words: _UInt64Array) -> _UInt64Array:
    """The finalizer of splitmix64: every output bit depends on every input bit."""
    word: _UInt64Array = words ^ (words >> np.uint64(30))
    word *= _MULTIPLIER_1
    word ^= word >> np.uint64(27)
    word *= _MULTIPLIER_2
    word ^= word >> np.uint64(31)
    return word
