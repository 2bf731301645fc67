"""The order of sequences as a function of their number: nothing is stored, so nothing has to be restored."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_Words = NDArray[np.uint64]

_EXACT_BELOW = (
    1024  # rows; up to here an epoch is a sorted list of random keys (8 KB), every order equally likely
)
_ROUNDS = 8
_CHUNK = 1 << 15  # indices worked on at a time: the 256 KB of one array stay in the processor's cache
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # increments and multipliers of splitmix64 (Steele et al., 2014)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


class SequenceOrder:
    """Which row is read as sequence number `i`, over endless epochs of `num_sequences` rows.

    Epoch `i // num_sequences` is a pseudo-random permutation of the rows that depends on the seed and the
    epoch alone, so any part of the order can be had at any time, by any number of ranks, in O(1) memory an
    index. With `shuffle=False` every epoch is in file order.
    """

    def __init__(self, num_sequences: int, seed: int, *, shuffle: bool = True) -> None:
        if num_sequences < 1:
            raise ValueError(f"num_sequences={num_sequences}: an order needs at least one row.")
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
        if self.num_sequences <= _EXACT_BELOW:
            return self._by_sorting(start, stop)
        return self._by_cipher(start, stop)

    def _epoch_keys(self, first: int, last: int) -> _Words:
        """One random word for each of the epochs [first, last]."""
        epochs = np.arange(last - first + 1, dtype=np.uint64) + np.uint64(first)
        return _mixed(_mixed(epochs * _GOLDEN) ^ self._key)

    def _by_sorting(self, start: int, stop: int) -> Indices:
        first, last = start // self.num_sequences, (stop - 1) // self.num_sequences
        rows = np.arange(1, self.num_sequences + 1, dtype=np.uint64) * _GOLDEN
        keys = _mixed(self._epoch_keys(first, last)[:, None] + rows)
        order = np.argsort(keys, axis=1, kind="stable").reshape(-1)
        offset = first * self.num_sequences
        return order[start - offset : stop - offset].astype(np.int64)

    def _by_cipher(self, start: int, stop: int) -> Indices:
        first, last = start // self.num_sequences, (stop - 1) // self.num_sequences
        found = np.empty(stop - start, np.int64)
        for epoch, key in enumerate(self._epoch_keys(first, last), start=first):
            offset = epoch * self.num_sequences
            lower, upper = max(start, offset), min(stop, offset + self.num_sequences)
            for begin in range(lower, upper, _CHUNK):
                end = min(begin + _CHUNK, upper)
                positions = np.arange(begin - offset, end - offset, dtype=np.uint64)
                found[begin - start : end - start] = _permuted(positions, self.num_sequences, key)
        return found


def _permuted(positions: _Words, size: int, key: Any) -> _Words:
    """Where a permutation of range(size), chosen by `key`, sends `positions`.

    A Feistel network permutes the numbers of just enough bits; what lands at or beyond `size` is sent
    through again until it falls inside (cycle walking), twice on average at the very most.
    """
    bits = (size - 1).bit_length()
    round_keys = _mixed(np.arange(1, _ROUNDS + 1, dtype=np.uint64) * _GOLDEN + key)
    limit = np.uint64(size)
    values = _encrypted(positions, bits, round_keys)
    outside = np.flatnonzero(values >= limit)
    while outside.size:
        values[outside] = _encrypted(values[outside], bits, round_keys)
        outside = outside[values[outside] >= limit]
    return values


def _encrypted(values: _Words, bits: int, round_keys: _Words) -> _Words:
    """A bijection on the numbers of `bits` bits: its halves change each other by turns."""
    low_bits = bits // 2
    high_bits = bits - low_bits
    low = values & np.uint64((1 << low_bits) - 1)
    high = values >> np.uint64(low_bits)
    for i, key in enumerate(round_keys):
        if i % 2:
            low ^= _hashed(high, key, low_bits)
        else:
            high ^= _hashed(low, key, high_bits)
    high <<= np.uint64(low_bits)
    high |= low
    return high


def _hashed(values: _Words, key: Any, bits: int) -> _Words:
    """A random-looking number of `bits` bits for each value: the top ones, which are the best mixed."""
    word: _Words = values ^ key
    word *= _FIRST
    word ^= word >> np.uint64(32)
    word *= _SECOND
    word >>= np.uint64(64 - bits)
    return word


def _mixed(words: _Words) -> _Words:
    """The finalizer of splitmix64: every bit of the result depends on every bit of the word."""
    word: _Words = words ^ (words >> np.uint64(30))
    word *= _FIRST
    word ^= word >> np.uint64(27)
    word *= _SECOND
    word ^= word >> np.uint64(31)
    return word
