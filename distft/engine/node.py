"""State that several ranks need whole: one of them reads it, or each a share, and sends it to the others."""

import socket
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from distft.checkpoint.fragments import Fragment
from distft.checkpoint.sources import StateSource, read_state
from distft.collectives import Collectives, all_or_none
from distft.errors import CheckpointError

_CHUNK_NUMEL = 1 << 28  # elements that a rank reads while the others wait
_SHARED_NUMEL = 1 << 24  # elements that all ranks together read before they exchange them


def read_once_per_node(source: StateSource, states: Sequence[Fragment], collectives: Collectives) -> None:
    """Fill the values of `states`, which every rank passes in the same order, from `source`.

    The first rank of each node reads; values are sent in place, so this needs no memory of its own. An error
    of a rank that reads is raised on all ranks.
    """
    nodes = _ranks_by_node(collectives.all_gather(socket.gethostname()))
    own = next(ranks for ranks in nodes if collectives.rank in ranks)
    group = _group_of_node(nodes, own)
    for chunk in _chunks(states, _CHUNK_NUMEL):
        with all_or_none(collectives, CheckpointError):
            if collectives.rank == own[0]:
                for state in chunk:
                    read_state(source, state.parameter, state.state, state.values, state.start)
        if len(own) > 1:
            for state in chunk:
                dist.broadcast(state.values, src=own[0], group=group)
    if group is not None:
        dist.destroy_process_group(group)


def read_in_shares(source: StateSource, states: Sequence[Fragment], collectives: Collectives) -> None:
    """Fill the values of small `states`, which every rank passes in the same order, from `source`.

    Each rank reads a share of each, cut as ZeRO 3 cuts parameters, so that after a save by as many ranks it
    reads its own file alone. An error of one rank is raised on all. Read whole by every one of 512 ranks, the
    161 norms of a 70B model are 42 million requests of 64 bytes.
    """
    rank, world_size = collectives.rank, collectives.world_size
    for chunk in _chunks(states, _SHARED_NUMEL):
        shares = []
        with all_or_none(collectives, CheckpointError):
            for state in chunk:
                numel = state.values.numel()
                per_rank = -(-numel // world_size)
                start, stop = (min(part * per_rank, numel) for part in (rank, rank + 1))
                share = torch.empty(stop - start, dtype=state.values.dtype)
                read_state(source, state.parameter, state.state, share, state.start + start)
                shares.append(share)
        gathered = collectives.all_gather(shares)
        for state, parts in zip(chunk, zip(*gathered, strict=True), strict=True):
            state.values.copy_(torch.cat(parts))


def _ranks_by_node(node_names: Sequence[str]) -> list[list[int]]:
    """The ranks of each node, given each rank's node; nodes in the order of their first ranks."""
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(node_names):
        nodes.setdefault(name, []).append(rank)
    return list(nodes.values())


def _group_of_node(nodes: Sequence[Sequence[int]], own: Sequence[int]) -> dist.ProcessGroup | None:
    """A new process group of the ranks `own`; None if they are all ranks, or a single one."""
    if len(nodes) == 1:
        return None
    # Every rank has to take part in the creation of every group.
    groups = {tuple(ranks): dist.new_group(list(ranks)) for ranks in nodes if len(ranks) > 1}
    return groups.get(tuple(own))


def _chunks(states: Sequence[Fragment], most_numel: int) -> Iterator[list[Fragment]]:
    chunk: list[Fragment] = []
    numel = 0
    for state in states:
        if chunk and numel + state.values.numel() > most_numel:
            yield chunk
            chunk, numel = [], 0
        chunk.append(state)
        numel += state.values.numel()
    if chunk:
        yield chunk
