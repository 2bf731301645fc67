"""What ranks say to each other outside of the engine: small values, votes, sums."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from distft.errors import DistftError, SupersededError, UnreachableError
from distft.rendezvous import fresh_store
from distft.topology import Topology

T = TypeVar("T")
_FOREVER = timedelta(days=365)  # torch prints a warning of each time-out, and blocks after it all the same


class Collectives(Protocol):
    """Calls that every rank makes in the same order."""

    rank: int
    world_size: int

    def all_gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on every rank. Small things only: they travel as objects."""

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of a tensor that is on the rank's own device; the argument is kept."""

    def twin(self) -> "Collectives":
        """The same ranks over a channel of their own, for the small values of another thread."""

    def store(self) -> Store | None:
        """Keys and values that all ranks see without waiting for each other; None for one rank alone.

        Each call gives an empty one, over a connection of its own. The process that serves it may be a
        rank's: a call that reads blocks for as long as that process is stopped.
        """


class SingleProcess:
    """The collectives of one process: everything is what it was."""

    rank = 0
    world_size = 1

    def all_gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        return value.clone()

    def twin(self) -> "SingleProcess":
        return self

    def store(self) -> None:
        return None


class ProcessGroup:
    """Collectives over torch.distributed; objects travel over gloo, tensors over the device's own backend."""

    def __init__(self, topology: Topology, device: torch.device, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            if topology.is_distributed:
                shared, rank, world_size = next(rendezvous("env://", timeout=timeout))
                dist.init_process_group(
                    backend,
                    store=fresh_store(shared, rank, world_size, timeout_s),
                    rank=rank,
                    world_size=world_size,
                    timeout=timeout,
                )
            else:  # one process that nobody launched, and yet an engine that wants a group
                dist.init_process_group(
                    backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
                )
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        # A timeout given to init_process_group is not honoured by gloo; one given to new_group is.
        self._timeout = timeout
        self._objects = dist.new_group(backend="gloo", timeout=timeout)

    def all_gather(self, value: T) -> list[T]:
        gathered: list[T | None] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._objects)
        return gathered  # type: ignore[return-value]  # every place has been filled

    def broadcast(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._objects)
        return box[0]

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    def twin(self) -> "ProcessGroup":
        other = copy(self)
        other._objects = dist.new_group(backend="gloo", timeout=self._timeout)
        return other

    def store(self) -> Store | None:
        if self.world_size == 1:
            return None
        # The one in which the ranks found each other, whoever started them: it reaches every node.
        shared: Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        shared.set_timeout(_FOREVER)
        return PrefixStore(self.broadcast(secrets.token_hex(8)), shared)

    def close(self) -> None:
        """Leave the group. Ranks need not arrive together."""
        dist.destroy_process_group()


# What these say of the world must not be taken for a fault of a file.
_KEPT: tuple[type[DistftError], ...] = (UnreachableError, SupersededError)


@contextmanager
def together(collectives: Collectives, error_type: type[DistftError]) -> Iterator[None]:
    """Fail on every rank if the block fails on any, so that no rank goes on alone and none hangs.

    The error that is raised names each rank that failed and why; it is an `UnreachableError` or a
    `SupersededError` where that was any rank's reason. Only foreseen failures take part in the vote: any
    other exception leaves the rank at once, and its peers by their time-out.
    """
    failure: DistftError | None = None
    try:
        yield
    except DistftError as error:
        failure = error
    except OSError as error:
        failure = error_type(f"{error.strerror or error}: {error.filename}.")
    kept = next((kind for kind in _KEPT if isinstance(failure, kind)), None)
    answers = collectives.all_gather(None if failure is None else (str(failure), kept))
    found = {answer[1] for answer in answers if answer is not None}
    error_type = next((kind for kind in _KEPT if kind in found), error_type)
    if failure is not None and (collectives.world_size == 1 or isinstance(failure, error_type)):
        raise failure
    said = [f"rank {rank}: {answer[0]}" for rank, answer in enumerate(answers) if answer is not None]
    if said:
        raise error_type("\n".join(dict.fromkeys(said)))
