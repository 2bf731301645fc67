"""The inputs of a run, read and checked: its data, its model, and what they amount to in steps and FLOPs."""

from dataclasses import dataclass

from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.sources import CheckpointSource
from distft.data.dataset import Labels
from distft.data.feed import AnyFeed, StreamFeed
from distft.data.streams import StreamsConfig
from distft.model.config import ModelConfig
from distft.model.counts import Flops, num_attention_pairs
from distft.model.heads import Heads
from distft.objective.interface import Passes
from distft.objective.mixture import Mixture
from distft.run.config import RunConfig
from distft.run.step_flops import StepFlops
from distft.tokenizer import Tokenizer

_FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """Inputs of a run, checked against each other. No memory is allocated for weights yet."""

    config: RunConfig  # with `model` set
    tokenizer: Tokenizer | None  # None: the model reads images alone
    model: ModelConfig
    train: AnyFeed
    validation: AnyFeed | None
    label_names: Labels  # of a classification
    heads: Heads
    shapes: dict[str, tuple[int, ...]]  # of every parameter
    trainable: set[str]
    init_from: CheckpointSource | None
    reference: CheckpointSource | None = None  # with which the objective compares the model
    notes: tuple[str, ...] = ()  # on the tokenizer

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return num_steps(self.config, self.train)

    @property
    def num_epochs(self) -> float:
        """How often the whole run uses each row of the training data, on average."""
        return self.total_steps * self.config.batch.global_batch_size / self.train.num_sequences

    @property
    def has_dropout(self) -> bool:
        """Whether training drops anything of the model or its adapters, or adds noise."""
        lora = self.config.lora
        return self.model.has_dropout or self.model.has_noise or (lora is not None and lora.dropout > 0)

    def original_bytes(self, name: str) -> int:
        """Of an element of a weight as it came, which a frozen one keeps in checkpoints."""
        source = self.init_from
        is_there = source is not None and source.has(name, WEIGHT)
        return source.dtype(name, WEIGHT).itemsize if source is not None and is_there else _FP32_BYTES

    @property
    def training_flops(self) -> dict[str, Flops]:
        """FLOPs of a step's passes, on rows of the run's length, by stream as in `Batch.work`.

        A row of a stream goes through the heads of that stream's part alone. Passes without a gradient, such
        as a teacher's, count too.
        """
        return {name: self._step_flops.of(heads, passes) for name, (heads, passes) in self._parts.items()}

    @property
    def recomputed_flops(self) -> dict[str, Flops]:
        """What full activation checkpointing adds to `training_flops`."""
        return {name: self._step_flops.recomputed(passes) for name, (_, passes) in self._parts.items()}

    @property
    def passes(self) -> dict[str, tuple[int, Passes]]:
        """The rows of a sequence, for which this reads one, and the passes of each, by stream."""
        streams = self.train.streams if isinstance(self.train, StreamFeed) else {"": self.train}
        return {
            name: (_rows_per_sequence(streams[name]), passes) for name, (_, passes) in self._parts.items()
        }

    @property
    def _parts(self) -> dict[str, tuple[Heads, Passes]]:
        """The heads and the passes of a row, by stream."""
        objective = self.config.objective
        if not isinstance(objective, Mixture):
            return {"": (self.heads, objective.passes)}
        parts: dict[str, tuple[Heads, Passes]] = {}
        for name in objective.parts:
            heads = {head: self.heads[head] for head in objective.heads_of_part(name, self.label_names)}
            parts[name] = (heads, objective.part(name).passes)
        return parts

    @property
    def _step_flops(self) -> StepFlops:
        return StepFlops(model=self.model, seq_len=self.config.batch.seq_len, trainable=self.trainable)

    @property
    def run_flops(self) -> float:
        """FLOPs of the whole run, of all ranks together, if every row holds one document."""
        batch, by_stream = self.config.batch, self.training_flops
        num_local_pairs = num_attention_pairs(batch.seq_len, self.model.attention_reach)
        shares = dict.fromkeys(by_stream, 1.0)
        if isinstance(self.config.data, StreamsConfig):
            shares = {name: stream.share for name, stream in self.config.data.streams.items()}
        rows = {name: num_rows for name, (num_rows, _) in self.passes.items()}
        per_sequence = sum(
            share * rows[name] * by_stream[name].of(batch.seq_len, batch.seq_len**2, num_local_pairs)
            for name, share in shares.items()
        )
        return per_sequence / sum(shares.values()) * batch.global_batch_size * self.total_steps


def _rows_per_sequence(feed: AnyFeed) -> int:
    return getattr(feed.batch(0, 1), "rows_per_sequence", 1)


def num_steps(config: RunConfig, train: AnyFeed) -> int:
    """Optimizer steps of the whole run."""
    return config.train.total_steps(
        num_sequences=train.num_sequences, global_batch_size=config.batch.global_batch_size
    )
