"""Collectives outside the engine: small objects, sums, and errors that every rank must see."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from distft.errors import ConfigError, DistftError, SupersededError, UnreachableError
from distft.rendezvous import fresh_store
from distft.topology import RankAxes, Topology

T = TypeVar("T")
# When a store's time-out expires, torch only warns and blocks again, so we choose one that never expires.
_NO_TIMEOUT = timedelta(days=365)


class Collectives(Protocol):
    """Calls that every rank must make in the same order.

    `rank` and `world_size` count all ranks, for files, votes and processes; `dp_rank` and `dp_world_size`
    those of the data axis, for the split of a batch.
    """

    rank: int
    world_size: int
    dp_rank: int
    dp_world_size: int

    def all_gather(self, value: T) -> list[T]:
        """All ranks' values in rank order, on every rank. For small values: they are pickled."""

    def gather(self, value: T) -> list[T] | None:
        """All ranks' values in rank order, on rank 0; None on the others. Pickled, as by `all_gather`."""

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        """The sum over ranks of a tensor on the rank's own device; the argument does not change."""

    def differentiable_sum(self, value: Tensor) -> Tensor:
        """As `all_reduce_sum`, with a gradient, for a loss that is the sum of the ranks' losses."""

    def differentiable_gather(self, rows: Tensor, row_counts: Sequence[int] | None = None) -> Tensor:
        """The rows [N, ...] of all ranks in rank order, [sum of N, ...], with a gradient; N may differ.

        `row_counts` are the N of all ranks; None: the ranks exchange them first, by `all_gather`.

        For a loss that is the sum of the ranks' losses: a row's gradient is the sum of its gradients in all
        ranks' losses. Averaging them instead, as many libraries do, shrinks it by the number of ranks.
        """

    def with_new_group(self) -> "Collectives":
        """The same ranks over a new process group, so that another thread can exchange small values."""

    def store(self) -> Store | None:
        """A new, empty key-value store that all ranks use without waiting for each other; None for one rank.

        Each call opens its own connection. A rank's process may serve the store: if that process is stopped,
        reads block until it continues.
        """


class SingleProcess:
    """Collectives of a single process: each returns its argument."""

    rank = dp_rank = 0
    world_size = dp_world_size = 1

    def all_gather(self, value: T) -> list[T]:
        return [value]

    def gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        return value.clone()

    def differentiable_sum(self, value: Tensor) -> Tensor:
        return value

    def differentiable_gather(self, rows: Tensor, row_counts: Sequence[int] | None = None) -> Tensor:  # noqa: ARG002
        return rows

    def with_new_group(self) -> "SingleProcess":
        return self

    def store(self) -> None:
        return None


class ProcessGroup:
    """Collectives over torch.distributed: objects over gloo, tensors over the device's backend."""

    def __init__(self, topology: Topology, device: torch.device, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        has_group = dist.is_initialized()  # Ray makes one
        if not has_group:
            backend = "nccl" if device.type == "cuda" else "gloo"
            # Named, NCCL connects the ranks now and not in the first collective, and barriers need not guess.
            device_id = device if device.type == "cuda" else None
            if topology.is_distributed:
                store, rank, world_size = next(rendezvous("env://", timeout=timeout))
                store = fresh_store(store, rank, world_size, timeout_s)
                # Before the group exists: ranks of different backends would wait for each other.
                store.set(f"device/{rank}", device.type)
                kinds = [store.get(f"device/{other}").decode() for other in range(world_size)]
                require_same_device(kinds)
                dist.init_process_group(
                    backend,
                    store=store,
                    rank=rank,
                    world_size=world_size,
                    timeout=timeout,
                    device_id=device_id,
                )
            else:  # no launcher, one process; DeepSpeed needs a process group all the same
                dist.init_process_group(
                    backend,
                    store=torch._C._distributed_c10d.HashStore(),
                    rank=0,
                    world_size=1,
                    device_id=device_id,
                )
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        axes = RankAxes(data=self.world_size)
        self.dp_rank, self.dp_world_size = axes.position("data", self.rank), axes.data
        # gloo ignores the timeout of init_process_group, but not that of new_group.
        self._timeout = timeout
        self._object_group = dist.new_group(backend="gloo", timeout=timeout)
        if has_group:  # its backend is of one kind of device, and ranks of others would wait for these
            require_same_device(self.all_gather(device.type))

    def all_gather(self, value: T) -> list[T]:
        gathered: list[T | None] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._object_group)
        return gathered  # type: ignore[return-value]  # all_gather_object has replaced every None

    def gather(self, value: T) -> list[T] | None:
        gathered: list[T | None] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0, group=self._object_group)
        return gathered  # type: ignore[return-value]

    def broadcast(self, value: T) -> T:
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._object_group)
        return values[0]

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    def differentiable_sum(self, value: Tensor) -> Tensor:
        return _DifferentiableSum.apply(value)  # type: ignore[no-any-return, no-untyped-call]

    def differentiable_gather(self, rows: Tensor, row_counts: Sequence[int] | None = None) -> Tensor:
        counts = self.all_gather(len(rows)) if row_counts is None else row_counts
        return _DifferentiableGather.apply(rows, self.rank, counts)  # type: ignore[no-any-return, no-untyped-call]

    def with_new_group(self) -> "ProcessGroup":
        other = copy(self)
        other._object_group = dist.new_group(backend="gloo", timeout=self._timeout)
        return other

    def store(self) -> Store | None:
        if self.world_size == 1:
            return None
        # The rendezvous store: every node can reach it, whichever launcher started the ranks.
        store: Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        store.set_timeout(_NO_TIMEOUT)
        return PrefixStore(self.broadcast(secrets.token_hex(8)), store)

    def close(self, *, has_failed: bool = False) -> None:
        """Destroy the process group. After a failure of this rank, do not wait for the others.

        With NCCL the ranks of a node destroy it together: a rank that failed alone would wait until it is
        killed, and its error would never be printed.
        """
        if has_failed and dist.get_backend() == "nccl":
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


class _DifferentiableSum(torch.autograd.Function):
    """y = sum of all x_r on every rank. The loss is a sum over ranks, so dL/dx_r = sum over s of dL_s/dy."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ARG004
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class _DifferentiableGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, rank: int, num_rows: Sequence[int]) -> Tensor:
        padded = rows.new_zeros(max(num_rows), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in num_rows]
        dist.all_gather(gathered, padded)
        ctx.own_rows = slice(sum(num_rows[:rank]), sum(num_rows[: rank + 1]))
        return torch.cat([part[:size] for part, size in zip(gathered, num_rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own_rows], None, None


def require_same_device(kinds: Sequence[str]) -> None:
    """Raise `ConfigError` if the ranks chose different kinds of device; `kinds` by rank."""
    if len(set(kinds)) > 1:
        usual = max(dict.fromkeys(kinds), key=list(kinds).count)
        odd = ", ".join(f"rank {rank} ({kind})" for rank, kind in enumerate(kinds) if kind != usual)
        raise ConfigError(
            f"Ranks chose different devices: {odd}, the others {usual}. torch finds no CUDA device on some "
            "nodes: check the driver there, take them out of the job, or set device=cpu."
        )


# Errors about the environment, not about a file: all_or_none must not turn them into a damaged file's error.
_PRESERVED: tuple[type[DistftError], ...] = (UnreachableError, SupersededError)


@contextmanager
def all_or_none(collectives: Collectives, error_type: type[DistftError]) -> Iterator[None]:
    """Raise on every rank if the block raises a `DistftError` or an `OSError` on any rank.

    The error is of `error_type`, or an `UnreachableError` or `SupersededError` if a rank raised that. A rank
    that raised such an error re-raises it; on the others it names each failed rank and its reason. Any other
    exception propagates on its own rank at once, and the other ranks fail when their collective times out.
    """
    local_error: DistftError | None = None
    try:
        yield
    except DistftError as error:
        local_error = error
    except OSError as error:
        local_error = error_type(f"{error.strerror or error}: {error.filename}.")
    preserved = next((kind for kind in _PRESERVED if isinstance(local_error, kind)), None)
    reports = collectives.all_gather(None if local_error is None else (str(local_error), preserved))
    preserved_anywhere = {report[1] for report in reports if report is not None}
    error_type = next((kind for kind in _PRESERVED if kind in preserved_anywhere), error_type)
    if local_error is not None and (collectives.world_size == 1 or isinstance(local_error, error_type)):
        raise local_error
    messages = [f"rank {rank}: {report[0]}" for rank, report in enumerate(reports) if report is not None]
    if messages:
        raise error_type("\n".join(messages))
