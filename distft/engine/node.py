"""State that all ranks of a node need whole: one of them reads it and sends it to the others."""

import socket
from collections.abc import Iterator, Sequence

import torch.distributed as dist

from distft.checkpoint.fragments import Fragment
from distft.checkpoint.sources import StateSource, read_state
from distft.collectives import Collectives, all_or_none
from distft.errors import CheckpointError

_CHUNK_NUMEL = 1 << 28  # elements that a rank reads while the others wait


def read_once_per_node(source: StateSource, states: Sequence[Fragment], collectives: Collectives) -> None:
    """Fill the values of `states`, which every rank passes in the same order, from `source`.

    The first rank of each node reads; values are sent in place, so this needs no memory of its own. An error
    of a rank that reads is raised on all ranks.
    """
    nodes = _ranks_by_node(collectives.all_gather(socket.gethostname()))
    own = next(ranks for ranks in nodes if collectives.rank in ranks)
    group = _group_of_node(nodes, own)
    for chunk in _chunks(states):
        with all_or_none(collectives, CheckpointError):
            if collectives.rank == own[0]:
                for state in chunk:
                    read_state(source, state.parameter, state.state, state.values, state.start)
        if len(own) > 1:
            for state in chunk:
                dist.broadcast(state.values, src=own[0], group=group)
    if group is not None:
        dist.destroy_process_group(group)


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


def _chunks(states: Sequence[Fragment]) -> Iterator[list[Fragment]]:
    chunk: list[Fragment] = []
    numel = 0
    for state in states:
        if chunk and numel + state.values.numel() > _CHUNK_NUMEL:
            yield chunk
            chunk, numel = [], 0
        chunk.append(state)
        numel += state.values.numel()
    if chunk:
        yield chunk
