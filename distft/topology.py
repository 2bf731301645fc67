"""Ranks, and how one optimizer step is shared out among them. Arithmetic only: no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from distft.errors import ConfigError

_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Where this process stands in the job. Read from the environment once, then passed by hand."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    is_distributed: bool = False  # started by a launcher, so a process group is expected

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> "Topology":
        """Follow the torchrun contract; with none of it set, this is a single process.

        Raises `ConfigError` for half an environment or for numbers that cannot be.
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
            raise ConfigError(f"The launch environment holds no number: {error}.") from None
        if not 0 <= rank < world_size:
            raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world_size}.")
        return cls(rank=rank, local_rank=local_rank, world_size=world_size, is_distributed=True)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences [start, stop) of the run's global order; empty where a rank only keeps step."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """Sizes of one optimizer step. Three are chosen and one is found; the rest follow.

    Any number of ranks can share any global batch: where it does not divide, shares differ by one
    sequence, and a rank with less to do runs an empty micro-batch, which adds nothing to loss or gradient.
    """

    global_batch_size: int  # sequences per optimizer step, over all ranks
    micro_batch_size: int  # sequences per rank per forward, at most
    seq_len: int  # tokens per sequence
    dp_world_size: int

    def __post_init__(self) -> None:
        faults = []
        if self.micro_batch_size > self.global_batch_size:
            faults.append(
                f"batch.micro_batch_size={self.micro_batch_size} is more than "
                f"batch.global_batch_size={self.global_batch_size}: lower it, or raise the global batch."
            )
        if self.dp_world_size > self.global_batch_size:
            faults.append(
                f"batch.global_batch_size={self.global_batch_size} is less than the "
                f"{self.dp_world_size} ranks of this run, so some would never work: "
                f"start at most {self.global_batch_size} ranks, or raise the global batch."
            )
        if faults:
            raise ConfigError("\n".join(faults))

    @property
    def gradient_accumulation_steps(self) -> int:
        largest_share = -(-self.global_batch_size // self.dp_world_size)
        return -(-largest_share // self.micro_batch_size)

    @property
    def global_batch_tokens(self) -> int:
        return self.global_batch_size * self.seq_len

    def micro_batches(self, step: int, dp_rank: int) -> list[MicroBatch]:
        """What `dp_rank` reads in optimizer step `step`: equally many micro-batches on every rank."""
        begin = step * self.global_batch_size
        return share(begin, begin + self.global_batch_size, self, dp_rank)


def share(start: int, stop: int, plan: BatchPlan, dp_rank: int) -> list[MicroBatch]:
    """Cut sequences [start, stop) among the ranks of `plan`, and `dp_rank`'s part into micro-batches."""
    numel = stop - start
    lower = start + numel * dp_rank // plan.dp_world_size
    upper = start + numel * (dp_rank + 1) // plan.dp_world_size
    largest_share = -(-numel // plan.dp_world_size)
    count = -(-largest_share // plan.micro_batch_size)
    cuts = [min(lower + i * plan.micro_batch_size, upper) for i in range(count + 1)]
    return [MicroBatch(a, b) for a, b in pairwise(cuts)]
