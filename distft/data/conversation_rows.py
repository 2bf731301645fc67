"""Conversations in memory, encoded, one or several in a row: the rows that `ConversationsConfig` builds."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from distft.data.batch import Batch, RaggedArray, count_target_bytes
from distft.data.encoded_once import EncodedTable
from distft.data.sampler import Indices
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import DataError


class Encoder:
    """Collects encoded conversations, each cut at the end to `seq_len` inputs and a last label."""

    def __init__(self, path: str, seq_len: int, *, refuses: bool = False) -> None:
        """With `refuses` one that is too long is a problem instead."""
        self._path = path
        self._seq_len = seq_len
        self._refuses = refuses
        self._rows: list[NDArray[np.int32]] = []
        self.num_read = self._num_cut = self._num_left_out = self._num_lost = self._num_targets = 0
        self.max_id = 0

    def add(self, ids: Sequence[int], is_assistant: Sequence[bool]) -> str | None:
        """Add a conversation; returns what is wrong with it."""
        self.num_read += 1
        if not any(is_assistant[1:]):
            return "becomes a text in which no token is the assistant's: does the chat template write it?"
        if len(ids) > self._seq_len + 1 and self._refuses:
            return (
                f"has {len(ids):,} tokens, more than batch.seq_len={self._seq_len} and a last one: raise "
                "it, or set too_long=cut."
            )
        kept, targets = np.array(ids[: self._seq_len + 1], np.int32), is_assistant[: self._seq_len + 1]
        self.max_id = max(self.max_id, int(kept.max()))
        if not any(targets[1:]):
            self._num_left_out += 1
            return None
        self._num_cut += len(kept) < len(ids)
        self._num_lost += sum(is_assistant[1:]) - sum(targets[1:])
        self._num_targets += sum(targets[1:])
        self._rows.append(kept * 2 + np.array(targets, np.int32))
        return None

    def table(self) -> EncodedTable:
        """Rows of 2 * id + whether the token has a loss. Raises `DataError` if the cut left no answer."""
        if not self._rows:
            raise DataError(
                f"{self._path}: none of its {self.num_read:,} conversations has an answer within the first "
                f"batch.seq_len={self._seq_len} tokens: raise it."
            )
        offsets = np.cumsum([0, *map(len, self._rows)], dtype=np.int64)
        rows = RaggedArray.of_arrays(np.concatenate(self._rows), offsets)
        summary = (
            f"{self._path}: {len(rows):,} conversations, {offsets[-1]:,} tokens, of which "
            f"{self._num_targets:,} are the assistant's; to fit seq_len={self._seq_len}, {self._num_cut:,} "
            f"were cut at the end, which cost {self._num_lost:,} tokens of answers"
        )
        if self._num_left_out:
            summary += f", and {self._num_left_out:,} more are left out, whose answers were all cut off"
        return EncodedTable(rows=rows, columns={}, facts={"summary": summary})


class ConversationRows:
    """Conversations, encoded once and kept in memory; with a `capacity` several share a row of that length.

    A conversation of N tokens takes N - 1 positions, whose label is the next token if the assistant writes
    it, else `IGNORE_INDEX`. Conversations that share a row are documents of their own: attention stays
    within one, and positions begin anew. Batches are padded on the right to their longest row.
    """

    def __init__(
        self,
        rows: RaggedArray,
        *,
        capacity: int | None = None,
        pad_id: int = 0,
        token_bytes: NDArray[np.int64] | None = None,
        summary: str = "conversations",
    ) -> None:
        """`rows`: as `Encoder.table` has them."""
        self._rows = rows
        self._pad_id = pad_id
        self._token_bytes = token_bytes
        self._is_packed = capacity is not None
        sizes = rows.lengths(np.arange(len(rows))) - 1
        self._packs: Sequence[Sequence[int]] = (
            [[index] for index in range(len(rows))] if capacity is None else pack(sizes.tolist(), capacity)
        )
        self.num_sequences = len(self._packs)
        self.fingerprint = f"{rows.fingerprint}-{capacity}"
        self.summary = summary
        if capacity is not None:
            share = sizes.sum() / (capacity * self.num_sequences)
            self.summary += f"\npacked into {self.num_sequences:,} rows, which are full to {share:.1%}"

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices`; for empty `indices`, row 0 without targets."""
        packs = [self._packs[index] for index in (indices.tolist() or [0])]
        members = np.array([index for pack in packs for index in pack], np.int64)
        flagged = self._rows.padded(members, 0)
        sizes = self._rows.lengths(members) - 1
        row_of = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
        lengths = np.bincount(row_of, sizes, len(packs)).astype(np.int64)
        shape = (len(packs), int(lengths.max()))
        inputs = np.full(shape, self._pad_id, np.int64)
        labels = np.full(shape, IGNORE_INDEX, np.int64)
        positions, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        filled = np.zeros(len(packs), np.int64)
        number = np.zeros(len(packs), np.int64)  # of a row's documents
        for tokens, size, row in zip(flagged, sizes.tolist(), row_of.tolist(), strict=True):
            place = slice(filled[row], filled[row] + size)
            inputs[row, place] = tokens[:size] >> 1
            following = tokens[1 : size + 1]
            labels[row, place] = np.where(following & 1, following >> 1, IGNORE_INDEX)
            positions[row, place] = np.arange(size)
            documents[row, place] = number[row]
            filled[row] += size
            number[row] += 1
        is_padding = np.arange(shape[1]) >= lengths[:, None]
        documents[is_padding] = np.repeat(number, shape[1] - lengths)
        positions[is_padding] = (np.cumsum(is_padding, axis=1) - 1)[is_padding]
        if not len(indices):
            labels[:] = IGNORE_INDEX
        return Batch(
            input_ids=torch.from_numpy(inputs),
            targets={NEXT_TOKEN: torch.from_numpy(labels)},
            num_targets={NEXT_TOKEN: int(np.count_nonzero(labels != IGNORE_INDEX))},
            position_ids=torch.from_numpy(positions) if self._is_packed else None,
            document_ids=torch.from_numpy(documents) if self._is_packed else None,
            lengths=torch.from_numpy(lengths),
            num_target_bytes=count_target_bytes(labels, self._token_bytes),
        )


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Items of `sizes` in bins of `capacity`: each, the largest first, into the fullest bin that takes it.

    The items of a bin are in order, and the bins in that of their first items.
    """
    bins_by_room: dict[int, list[list[int]]] = {}
    rooms: list[int] = []  # of the bins, distinct and ascending
    bins = []
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        at = bisect_left(rooms, sizes[item])
        if at == len(rooms):
            chosen, room = list[int](), capacity
            bins.append(chosen)
        else:
            room = rooms[at]
            chosen = bins_by_room[room].pop()
            if not bins_by_room[room]:
                del bins_by_room[room], rooms[at]
        chosen.append(item)
        left = room - sizes[item]
        if left not in bins_by_room:
            insort(rooms, left)
            bins_by_room[left] = []
        bins_by_room[left].append(chosen)
    return sorted(map(sorted, bins))
