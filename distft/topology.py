"""Ranks, and how the sequences of one optimizer step are split among them. Arithmetic only: no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from distft.errors import ConfigError

_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


Axis = Literal["pipeline", "data", "sequence", "tensor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankAxes:
    """Sizes of the axes along which ranks divide the work; their product is the world size.

    Ranks are numbered with the tensor axis innermost: its ranks communicate most, so they are neighbours.
    """

    pipeline: int = 1  # blocks of the model
    data: int = 1  # sequences of the global batch
    sequence: int = 1  # positions within a sequence
    tensor: int = 1  # rows or columns of weights

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.sequence * self.tensor

    def position(self, axis: Axis, rank: int) -> int:
        """Where `rank` is on `axis`, from 0."""
        inner = 1
        for name in reversed(get_args(Axis)):
            size: int = getattr(self, name)
            if name == axis:
                return rank // inner % size
            inner *= size
        raise ValueError(f"{axis!r} is not one of {get_args(Axis)}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """This process's rank in the job. Read from the environment once, then passed as an argument."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    is_distributed: bool = False  # started by a launcher, which expects a process group

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Topology":
        """Read torchrun's variables; without any of them this is a single process.

        Raises `ConfigError` if some are missing, or are not valid numbers.
        """
        present = [name for name in _LAUNCH_VARIABLES if name in env]
        if not present:
            return cls()
        missing = [name for name in _LAUNCH_VARIABLES if name not in env]
        if missing:
            raise ConfigError(
                f"Incomplete launch environment: {', '.join(present)} set, but not {', '.join(missing)}. "
                "Start with torchrun, deepspeed or Ray, or unset them all for a single process."
            )
        try:
            rank, local_rank, world_size = (int(env[name]) for name in _LAUNCH_VARIABLES)
        except ValueError as error:
            raise ConfigError(f"{', '.join(_LAUNCH_VARIABLES)} must be whole numbers: {error}.") from None
        if not 0 <= rank < world_size:
            raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world_size}.")
        return cls(rank=rank, local_rank=local_rank, world_size=world_size, is_distributed=True)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def axes(self) -> RankAxes:
        """All ranks are data-parallel: no engine uses another axis yet."""
        return RankAxes(data=self.world_size)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences [start, stop) of the run's global order. Empty if the rank only takes part in collectives."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """Sizes of one optimizer step. The user chooses three, the launcher the world size; the rest is derived.

    Any number of ranks can split any global batch. If it does not divide evenly, ranks differ by one
    sequence; a rank with fewer may run an empty micro-batch, which adds nothing to loss or gradient.
    """

    global_batch_size: int  # sequences per optimizer step, over all ranks
    micro_batch_size: int  # sequences per rank per forward, at most
    seq_len: int  # tokens per sequence
    dp_world_size: int

    def __post_init__(self) -> None:
        errors = []
        if self.micro_batch_size > self.global_batch_size:
            errors.append(
                f"batch.micro_batch_size={self.micro_batch_size} is more than "
                f"batch.global_batch_size={self.global_batch_size}: lower it, or raise the global batch."
            )
        if self.dp_world_size > self.global_batch_size:
            errors.append(
                f"batch.global_batch_size={self.global_batch_size} is less than the "
                f"{self.dp_world_size} ranks of this run, so some ranks would have no data: "
                f"start at most {self.global_batch_size} ranks, or raise the global batch."
            )
        if errors:
            raise ConfigError("\n".join(errors))

    @property
    def gradient_accumulation_steps(self) -> int:
        max_sequences_per_rank = -(-self.global_batch_size // self.dp_world_size)
        return -(-max_sequences_per_rank // self.micro_batch_size)

    @property
    def global_batch_tokens(self) -> int:
        return self.global_batch_size * self.seq_len

    def micro_batches(self, step: int, dp_rank: int) -> list[MicroBatch]:
        """The micro-batches of `dp_rank` in optimizer step `step`; every rank has the same number of them."""
        begin = step * self.global_batch_size
        return split_among_ranks(begin, begin + self.global_batch_size, self, dp_rank)


def split_among_ranks(start: int, stop: int, plan: BatchPlan, dp_rank: int) -> list[MicroBatch]:
    """Split sequences [start, stop) evenly among ranks; return those of `dp_rank`, cut into micro-batches.

    Every rank gets the same number of micro-batches, the last ones possibly empty, because each forward is a
    collective under ZeRO 3.
    """
    num_sequences = stop - start
    lower = start + num_sequences * dp_rank // plan.dp_world_size
    upper = start + num_sequences * (dp_rank + 1) // plan.dp_world_size
    max_sequences_per_rank = -(-num_sequences // plan.dp_world_size)
    num_micro_batches = -(-max_sequences_per_rank // plan.micro_batch_size)
    cuts = [min(lower + i * plan.micro_batch_size, upper) for i in range(num_micro_batches + 1)]
    return [MicroBatch(a, b) for a, b in pairwise(cuts)]
