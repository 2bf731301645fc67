"""Micro-batches of token rows: the type that model and objective take, padding and merging."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad
from xxhash import xxh3_64_hexdigest

from distft.data.sampler import Indices
from distft.data.targets import IGNORE_INDEX
from distft.keyed_random import row_keys, stream_seed

_MODEL_INPUTS = (
    "input_ids",
    "position_ids",
    "document_ids",
    "is_prefix",
    "segment_ids",
    "lengths",
    "dropout_keys",
    "images",
)


_PREPARED = ("dropout_keys", "counted_pairs", "counted_local_pairs", "counted_tokens")  # by `Batch.for_step`


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B rows of T tokens with their targets, which are tensors by name.

    Targets equal to `IGNORE_INDEX` have no loss; `num_targets` counts the others, by the same names. A
    sequence of the run's order may be several rows, one after another: the texts of a pair, or views of one.
    """

    input_ids: Tensor  # int64 [B, T]; of images without texts [B, 1], which is not read
    targets: Mapping[str, Tensor]  # [B, T], [B] or [B, K]
    num_targets: Mapping[str, int]
    rows_per_sequence: int = 1
    sequence_numbers: Tensor | None = (
        None  # int64 [B]: of the row's sequence in the run's order; None: unknown
    )
    position_ids: Tensor | None = None  # int64 [B, T]; None: 0, 1, 2, ... in each row
    document_ids: Tensor | None = None  # int64 [B, T]; attention stays within one id; None: one id per row
    is_prefix: Tensor | None = None  # bool [B, T]: tokens that earlier ones of their document attend to, too
    segment_ids: Tensor | None = None  # int64 [B, T]: which text of a pair each token is of; None: 0
    lengths: Tensor | None = None  # int64 [B]: tokens before the right padding; None: no padding
    images: Tensor | None = None  # uint8 [B, channels, height, width]
    is_captioned: bool = False  # each row's tokens are the text of its image
    num_target_bytes: int = 0  # UTF-8 bytes of the target tokens; 0 if unknown
    dropout_keys: Tensor | None = None  # int64 [B]: what dropout draws in each row; None: at random
    counted_pairs: int | None = None  # `num_attention_pairs`, once counted
    counted_local_pairs: int | None = None  # those in a window, once counted; None: as many
    counted_tokens: int | None = None  # `num_real_tokens`, once counted

    @property
    def num_attention_pairs(self) -> int:
        """The sum of the squared lengths of all documents, each of which attends only to itself.

        Unless `counted_pairs` has it, this reads the batch: on a GPU it would wait.
        """
        if self.counted_pairs is not None:
            return self.counted_pairs
        return self._count_pairs(None)

    def _count_pairs(self, reach: int | None) -> int:
        """Of tokens at most `reach` positions apart."""
        num_rows, width = self.input_ids.shape
        if self.document_ids is None or self.position_ids is None:
            num_copies, positions = num_rows, torch.arange(width)
        else:
            num_copies, positions = 1, self.position_ids
        if reach is not None:
            positions = positions.clamp_max(reach)
        # 1 + 3 + 5 + ... over a document of L tokens is L ** 2: each token is in a pair with itself and, both
        # ways round, with those before it.
        return num_copies * int((2 * positions + 1).sum())

    @property
    def views_per_sequence(self) -> int:
        """The texts and images that belong together."""
        return self.rows_per_sequence * (2 if self.is_captioned else 1)

    @property
    def num_tokens(self) -> int:
        """Padding included."""
        return self.input_ids.numel()

    @property
    def num_real_tokens(self) -> int:
        """Without padding, and without rows that stand for none (`without_targets`).

        Unless `counted_tokens` has it, this reads the batch: on a GPU it would wait.
        """
        if self.counted_tokens is not None:
            return self.counted_tokens
        return self.num_tokens if self.lengths is None else int(self.lengths.sum())

    @property
    def work(self) -> Mapping[str, tuple[int, int, int]]:
        """Tokens, attention pairs, and those in a window: what a pass costs.

        The key names the stream, if there are any.
        """
        pairs, local_pairs = self.num_attention_pairs, self.counted_local_pairs
        return {"": (self.num_tokens, pairs, pairs if local_pairs is None else local_pairs)}

    @property
    def model_inputs(self) -> dict[str, Tensor | None]:
        """The arguments of `Transformer.forward`."""
        return {name: getattr(self, name) for name in _MODEL_INPUTS}

    def row_keys(self, seed: int) -> Tensor:
        """int64 [B]: what random numbers of each row depend on; each row of a sequence has another one."""
        assert self.sequence_numbers is not None
        keys = torch.empty_like(self.sequence_numbers)
        for view in range(self.rows_per_sequence):
            rows = slice(view, None, self.rows_per_sequence)
            keys[rows] = row_keys(seed, self.sequence_numbers[rows], view)
        return keys

    def without_targets(self) -> "Batch":
        """The same rows, of which nothing is learnt."""
        targets = {name: torch.full_like(target, IGNORE_INDEX) for name, target in self.targets.items()}
        return replace(
            self,
            targets=targets,
            num_targets=dict.fromkeys(self.num_targets, 0),
            num_target_bytes=0,
            counted_tokens=0,
        )

    def for_step(self, dropout_seed: int | None, attention_reach: int | None = None) -> "Batch":
        """With all that a step reads of it on the host, while it is in host memory.

        `dropout_seed` None: no dropout; `attention_reach` None: no layer's attention has a window.
        """
        batch = replace(
            self,
            counted_pairs=self.num_attention_pairs,
            counted_local_pairs=None if attention_reach is None else self._count_pairs(attention_reach),
            counted_tokens=self.num_real_tokens,
        )
        return batch if dropout_seed is None else replace(batch, dropout_keys=self.row_keys(dropout_seed))

    def tensors(self) -> list[Tensor]:
        """Every tensor of the batch, its targets included."""
        values = [getattr(self, field.name) for field in fields(self)]
        return [value for value in (*values, *self.targets.values()) if isinstance(value, Tensor)]

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory, from which copies to a GPU do not wait."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {
            f.name: function(value)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        targets = {name: function(target) for name, target in self.targets.items()}
        return replace(self, **changed, targets=targets)


@dataclass(frozen=True, slots=True)
class MixedBatch:
    """A micro-batch of several data streams, by the stream's name.

    A stream without a row in it has a batch without targets, since each forward is a collective under ZeRO 3.
    A stream without a row in the whole step may be absent.
    """

    streams: Mapping[str, Batch]

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.streams.values())

    @property
    def num_real_tokens(self) -> int:
        return sum(batch.num_real_tokens for batch in self.streams.values())

    @property
    def work(self) -> Mapping[str, tuple[int, int, int]]:
        """As of a `Batch`, by stream."""
        return {name: batch.work[""] for name, batch in self.streams.items()}

    def for_step(self, dropout_seed: int | None, attention_reach: int | None = None) -> "MixedBatch":
        def seed(name: str) -> int | None:
            return None if dropout_seed is None else stream_seed(dropout_seed, name)

        return MixedBatch(
            {name: batch.for_step(seed(name), attention_reach) for name, batch in self.streams.items()}
        )

    def tensors(self) -> list[Tensor]:
        return [tensor for batch in self.streams.values() for tensor in batch.tensors()]

    def to(self, device: torch.device) -> "MixedBatch":
        return MixedBatch({name: batch.to(device) for name, batch in self.streams.items()})

    def pin_memory(self) -> "MixedBatch":
        return MixedBatch({name: batch.pin_memory() for name, batch in self.streams.items()})


AnyBatch: TypeAlias = Batch | MixedBatch


class RaggedArray:
    """Rows of int32 of different lengths in one flat array: 4 bytes per value and 8 per row."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        lengths = np.fromiter((len(row) for row in rows), np.int64, count=len(rows))
        self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self._values = np.empty(self._offsets[-1], np.int32)
        for row, offset in zip(rows, self._offsets, strict=False):
            self._values[offset : offset + len(row)] = row

    @classmethod
    def of_arrays(cls, values: NDArray[np.int32], offsets: Indices) -> "RaggedArray":
        """Rows `values[offsets[i] : offsets[i + 1]]`. Raises `ValueError` for impossible offsets."""
        if not len(offsets) or offsets[0] or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise ValueError("the offsets of rows do not fit their values")
        rows = cls([])
        rows._values, rows._offsets = values, offsets
        return rows

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arguments of `of_arrays`."""
        return {"values": self._values, "offsets": self._offsets}

    @property
    def fingerprint(self) -> str:
        """A digest of all rows."""
        return xxh3_64_hexdigest(self._offsets.tobytes() + self._values.tobytes())

    @property
    def max_value(self) -> int:
        """The largest value in any row; 0 if there are no values."""
        return int(self._values.max(initial=0))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def lengths(self, indices: Indices) -> Indices:
        """Lengths of rows `indices`."""
        lengths: Indices = self._offsets[indices + 1] - self._offsets[indices]
        return lengths

    def padded(self, indices: Indices, pad_id: int) -> NDArray[np.int64]:
        """Rows `indices` [B, T], padded on the right to the longest of them."""
        lengths = self.lengths(indices)
        columns = np.arange(lengths.max(), dtype=np.int64)
        is_real = columns < lengths[:, None]
        padded = np.full(is_real.shape, pad_id, np.int64)
        positions = (self._offsets[indices][:, None] + columns)[is_real]
        padded[is_real] = self._values[positions]
        return padded


def count_target_bytes(labels: NDArray[np.int64], token_bytes: NDArray[np.int64] | None) -> int:
    """UTF-8 bytes of the target tokens in `labels`; 0 if `token_bytes` is None."""
    if token_bytes is None:
        return 0
    return int(token_bytes[labels[labels != IGNORE_INDEX]].sum())


def merge_batches(batches: Sequence[Batch], row_positions: Sequence[Indices]) -> Batch:
    """Merge batches into one: row `i` of batch `b` becomes row `row_positions[b][i]`.

    Shorter rows are padded on the right; `lengths` excludes the padding. A field or a target that some
    batches lack gets, for their rows, the value that its absence means. Targets are [B, T] or [B].

    Raises `ValueError` for sequences of several rows, for rows with images beside rows without, and for
    batches that `for_step` or `without_targets` has prepared: they are merged before that.
    """
    if len(batches) == 1:
        return batches[0]
    _require_mergeable(batches)
    order = torch.from_numpy(np.argsort(np.concatenate(row_positions), kind="stable"))
    width = max(batch.input_ids.shape[1] for batch in batches)

    def concatenate(tensors: Sequence[Tensor], fill: int) -> Tensor:
        rows = [t if t.ndim == 1 else pad(t, (0, width - t.shape[1]), value=fill) for t in tensors]
        return torch.cat(rows)[order]

    def concatenate_optional(name: str, default: Callable[[Batch], Tensor]) -> Tensor | None:
        tensors = [getattr(batch, name) for batch in batches]
        if all(tensor is None for tensor in tensors):
            return None
        filled = [default(b) if t is None else t for b, t in zip(batches, tensors, strict=True)]
        return concatenate(filled, 0)

    def target(name: str) -> Tensor:
        like = next(batch.targets[name] for batch in batches if name in batch.targets)
        return concatenate(
            [batch.targets[name] if name in batch.targets else _no_targets(batch, like) for batch in batches],
            IGNORE_INDEX,
        )

    names = list(dict.fromkeys(name for batch in batches for name in batch.targets))
    is_padded = len({batch.input_ids.shape[1] for batch in batches}) > 1
    return Batch(
        input_ids=concatenate([batch.input_ids for batch in batches], 0),
        targets={name: target(name) for name in names},
        num_targets={name: sum(batch.num_targets.get(name, 0) for batch in batches) for name in names},
        sequence_numbers=concatenate_optional("sequence_numbers", _unknown_numbers),
        position_ids=concatenate_optional("position_ids", _positions),
        document_ids=concatenate_optional("document_ids", lambda batch: torch.zeros_like(batch.input_ids)),
        segment_ids=concatenate_optional("segment_ids", lambda batch: torch.zeros_like(batch.input_ids)),
        is_prefix=concatenate_optional(
            "is_prefix", lambda batch: torch.zeros_like(batch.input_ids, dtype=torch.bool)
        ),
        lengths=concatenate([_lengths(batch) for batch in batches], 0)
        if is_padded
        else concatenate_optional("lengths", _lengths),
        images=None if batches[0].images is None else torch.cat([_images(batch) for batch in batches])[order],
        is_captioned=batches[0].is_captioned,
        num_target_bytes=sum(batch.num_target_bytes for batch in batches),
    )


def _require_mergeable(batches: Sequence[Batch]) -> None:
    if any(batch.rows_per_sequence != 1 for batch in batches):
        raise ValueError("sequences of several rows cannot be merged")
    if len({(batch.images is None, batch.is_captioned) for batch in batches}) > 1:
        raise ValueError("rows with and without images, or their texts, cannot be merged")
    prepared = [name for name in _PREPARED if any(getattr(batch, name) is not None for batch in batches)]
    if prepared:
        raise ValueError(f"batches are merged before they have {', '.join(prepared)}")


def _images(batch: Batch) -> Tensor:
    assert batch.images is not None  # `_require_mergeable`
    return batch.images


def _no_targets(batch: Batch, like: Tensor) -> Tensor:
    shape = batch.input_ids.shape if like.ndim > 1 else batch.input_ids.shape[:1]
    return like.new_full(shape, IGNORE_INDEX)


def _positions(batch: Batch) -> Tensor:
    return torch.arange(batch.input_ids.shape[1]).expand(batch.input_ids.shape)


def _lengths(batch: Batch) -> Tensor:
    num_rows, width = batch.input_ids.shape
    return torch.full((num_rows,), width) if batch.lengths is None else batch.lengths


def _unknown_numbers(batch: Batch) -> Tensor:
    raise AssertionError(f"a batch of {len(batch.input_ids)} rows without sequence numbers")
