"""What the reference of a run gives each row: computed once, by all ranks, and stored beside the checkpoints.

Training then holds one model, at any number of ranks. Blocks of rows are files of their own, so that an
interrupted computation goes on where it was. Rank 0 alone reads and writes them.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distft import storage
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.damage import require_undamaged
from distft.checkpoint.sources import CheckpointSource
from distft.collectives import Collectives, all_or_none
from distft.data.added_target import RowsWithTarget
from distft.data.dataset import SequenceDataset
from distft.data.feed import Feed
from distft.errors import CheckpointError, ConfigError, StorageError
from distft.objective.interface import Model, Objective, ObjectiveContext
from distft.run.block_files import BlockFiles
from distft.run.engines import build_engine
from distft.run.reference_source import weights_fingerprint
from distft.run.run_inputs import RunInputs
from distft.run.training_module import build_objective_context
from distft.topology import BatchPlan, split_among_ranks

DIRECTORY = "reference"  # beside the commits of a run
_BLOCK_SEQUENCES = 2048  # what an interruption loses at most
_NO_MEANING = {"dropout", "attention_kernel", "init_std"}  # settings of a model that its outputs do not show

Values = NDArray[np.float32]  # [sequences, rows of each]


@dataclass(frozen=True, kw_only=True, slots=True)
class Computation:
    """A model with the reference's weights, and how it is run."""

    model: Model
    module: nn.Module
    device: torch.device


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceValues:
    """The values of one run's rows, as an objective defines them. All ranks call its methods together."""

    objective: Objective
    context: ObjectiveContext
    root: str  # where the checkpoints of the run are
    micro_batch_size: int
    seq_len: int
    identity: Mapping[str, Any]  # what the values depend on besides the rows

    def stored(self, rows: SequenceDataset, *, refuses_others: bool) -> dict[int, Values]:
        """The values of blocks that are stored, by the block's first sequence.

        With `refuses_others` it raises `ConfigError` on all ranks if they are of another reference.
        """
        collectives = self.context.collectives
        found: dict[int, Values] = {}
        with all_or_none(collectives, ConfigError):
            if collectives.rank == 0:
                found = self._read(rows, refuses_others=refuses_others)
        return collectives.broadcast(found)

    def _read(self, rows: SequenceDataset, *, refuses_others: bool) -> dict[int, Values]:
        blocks, identity = self._blocks(rows)
        before = blocks.stored_identity()
        if before is None:
            return {}
        if changed := [name for name, value in identity.items() if before.get(name) != value]:
            if not refuses_others:
                return {}
            raise ConfigError(
                f"{blocks.directory} has what another reference gives these rows, which this run, or an "
                f"earlier start of it, compared its model with: {' and '.join(changed)} differ. Restore the "
                "reference, or choose another run_dir."
            )
        sizes = {
            start: min(_BLOCK_SEQUENCES, rows.num_sequences - start) for start in _starts(rows.num_sequences)
        }
        return {
            start: _values(blocks, start, size) for start, size in sizes.items() if blocks.has(start, size)
        }

    def complete(
        self,
        rows: SequenceDataset,
        found: Mapping[int, Values],
        computation: Computation,
        *,
        stores: bool,
    ) -> dict[int, Values]:
        """All values: those in `found`, and the others, which are computed and with `stores` written."""
        collectives, num_sequences, found = self.context.collectives, rows.num_sequences, dict(found)
        blocks, _ = self._blocks(rows)
        if stores:
            with all_or_none(collectives, StorageError):
                if collectives.rank == 0:
                    blocks.open()
        for start in _starts(num_sequences):
            stop = min(start + _BLOCK_SEQUENCES, num_sequences)
            if start not in found:
                found[start] = self._compute(rows, start, stop, computation)
                with all_or_none(collectives, StorageError):
                    if stores and collectives.rank == 0:
                        _write(blocks, start, found[start])
        return found

    def keep(self, rows: SequenceDataset, found: Mapping[int, Values]) -> None:
        """Write the blocks in `found`. Raises `ConfigError` on all ranks if others' are there."""
        collectives, (blocks, _) = self.context.collectives, self._blocks(rows)
        with all_or_none(collectives, ConfigError):
            if collectives.rank == 0:
                try:
                    blocks.open()
                except (ConfigError, NotADirectoryError) as error:
                    raise ConfigError(
                        f"{self.root} holds something else than this reference's values: remove it, or name "
                        f"another objective.reference_dir. ({error})"
                    ) from error
        with all_or_none(collectives, StorageError):
            for start, values in found.items() if collectives.rank == 0 else ():
                if not blocks.has(start, len(values)):
                    _write(blocks, start, values)

    @torch.no_grad()
    def _compute(self, rows: SequenceDataset, start: int, stop: int, computation: Computation) -> Values:
        collectives = self.context.collectives
        plan = BatchPlan(
            global_batch_size=max(stop - start, collectives.dp_world_size),
            micro_batch_size=min(self.micro_batch_size, stop - start),
            seq_len=self.seq_len,
            dp_world_size=collectives.dp_world_size,
        )
        own = []
        with _evaluating(computation.module):
            for micro in split_among_ranks(start, stop, plan, collectives.dp_rank):
                batch = rows.batch(np.arange(micro.start, micro.stop)).to(computation.device)
                values = self.objective.reference_values(computation.model, batch, self.context)
                own.append(values[: len(micro) * batch.rows_per_sequence].float().cpu())
        # Each rank has a contiguous share, so the ranks' values one after another are in the rows' order.
        gathered = collectives.all_gather(torch.cat(own).numpy())
        found: Values = np.concatenate(gathered).reshape(stop - start, -1)
        if not np.isfinite(found).all():
            raise ConfigError(
                "The reference gives values that are not finite, so nothing can be compared with it: is it a "
                "checkpoint of a run that diverged, or is engine.param_dtype too narrow for it?"
            )
        return found

    def _blocks(self, rows: SequenceDataset) -> tuple[BlockFiles, dict[str, Any]]:
        """The files of these rows, and their identity."""
        identity = {
            **self.identity,
            "target": self.objective.reference_target,
            "rows": rows.fingerprint,
            "num_sequences": rows.num_sequences,
            "block_sequences": _BLOCK_SEQUENCES,
        }
        return BlockFiles(storage.join(self.root, DIRECTORY, str(rows.fingerprint)), identity), identity

    def is_complete(self, rows: SequenceDataset, found: Mapping[int, Values]) -> bool:
        """Whether all blocks are there."""
        return len(found) == len(_starts(rows.num_sequences))

    def added(self, feed: Feed, found: Mapping[int, Values]) -> Feed:
        """The feed, whose rows have the values of all blocks."""
        assert self.objective.reference_target is not None
        (rows,) = feed.datasets
        values = np.concatenate([found[start] for start in _starts(rows.num_sequences)])
        return feed.with_rows(RowsWithTarget(rows, self.objective.reference_target, values))


def reference_identity(
    source: CheckpointSource,
    shapes: Mapping[str, tuple[int, ...]],
    model_settings: Mapping[str, Any],
    tokenizer_fingerprint: str | None,
    collectives: Collectives,
) -> dict[str, Any]:
    """What values depend on besides the rows. Called by all ranks together."""
    return {
        "weights": weights_fingerprint(source, shapes, collectives),
        "tokenizer": tokenizer_fingerprint,
        "model": {name: value for name, value in model_settings.items() if name not in _NO_MEANING},
    }


def require_undamaged_reference(source: CheckpointSource, collectives: Collectives) -> None:
    """Read every byte of it. Called by all ranks together; raises `CheckpointError` on all of them."""
    if isinstance(source, Checkpoint):
        source.verify(collectives)
        return
    with all_or_none(collectives, CheckpointError):
        if collectives.rank == 0:
            require_undamaged(source)


def with_reference(
    inputs: RunInputs,
    plan: BatchPlan,
    collectives: Collectives,
    device: torch.device,
    *,
    root: str,
    on_note: Callable[[str], None],
) -> RunInputs:
    """The inputs, whose rows have what the reference gives them; the same if the objective has none.

    Called by all ranks together. Values that are not stored below `root` are computed by the run's own kind
    of engine, so that a reference needs no more memory than the training. Raises `ConfigError` if those that
    are stored are of another reference.
    """
    source, config = inputs.reference, inputs.config
    if source is None:
        return inputs
    values = ReferenceValues(
        objective=config.objective,
        context=build_objective_context(inputs, plan, collectives, device),
        root=root,
        micro_batch_size=config.evaluation.micro_batch_size or config.batch.micro_batch_size,
        seq_len=config.batch.seq_len,
        identity=reference_identity(
            source,
            inputs.shapes,
            inputs.model.model_dump(mode="json"),
            None if inputs.tokenizer is None else inputs.tokenizer.fingerprint,
            collectives,
        ),
    )
    feeds = {"train": inputs.train, "validation": inputs.validation}
    given = {use: feed for use, feed in feeds.items() if isinstance(feed, Feed)}
    found = {use: values.stored(feed.datasets[0], refuses_others=True) for use, feed in given.items()}
    shared = _shared(values, inputs, device)
    if shared is not None:
        for use, feed in given.items():
            of_others = shared.stored(feed.datasets[0], refuses_others=False)
            values.keep(feed.datasets[0], of_others)
            shared.keep(feed.datasets[0], {})  # so that what is wrong with the directory is told now
            found[use] = of_others | found[use]
    lacking = [use for use, feed in given.items() if not values.is_complete(feed.datasets[0], found[use])]
    if lacking:
        require_undamaged_reference(source, collectives)
        on_note(f"computing what the reference, {source.path}, gives the rows of {' and '.join(lacking)}")
        engine = build_engine(replace(inputs, init_from=source), None, plan, collectives, device)
        try:
            computation = Computation(model=engine.model, module=engine.module, device=device)
            for use in lacking:
                rows = given[use].datasets[0]
                found[use] = values.complete(rows, found[use], computation, stores=True)
        finally:
            engine.close()
    if shared is not None:
        for use, feed in given.items():
            shared.keep(feed.datasets[0], found[use])
    added: dict[str, Any] = {use: values.added(feed, found[use]) for use, feed in given.items()}
    return replace(inputs, **added)


def _shared(values: ReferenceValues, inputs: RunInputs, device: torch.device) -> ReferenceValues | None:
    """The values below `objective.reference_dir`, of all runs that compute alike; None without one."""
    directory, engine = getattr(inputs.config.objective, "reference_dir", None), inputs.config.engine
    if directory is None:
        return None
    precision = engine.model_dump(
        include={"param_dtype", "frozen_bits", "fp8", "fp8_min_features", "allow_tf32"}
    )
    quantized = None if engine.frozen_bits is None else sorted(set(inputs.shapes) - set(inputs.trainable))
    identity = {**values.identity, **precision, "frozen": quantized, "device": device.type}
    text = json.dumps(identity, sort_keys=True)
    name = blake2b(text.encode(), digest_size=8).hexdigest()
    return replace(values, root=storage.join(directory, name), identity=identity)


def _starts(num_sequences: int) -> range:
    return range(0, num_sequences, _BLOCK_SEQUENCES)


def _write(blocks: BlockFiles, start: int, values: Values) -> None:
    blocks.write(start, ({"values": row} for row in values.tolist()))


def _values(blocks: BlockFiles, start: int, num_sequences: int) -> Values:
    """Raises `ConfigError` for a block that has a checksum, but no values."""
    try:
        values = np.array([row["values"] for row in blocks.read(start)], np.float32)
        if values.shape[:1] != (num_sequences,) or values.ndim != 2 or not np.isfinite(values).all():
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{blocks.directory} has a file that distft did not write: remove it, and its values are "
            "computed again."
        ) from None
    return values


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
