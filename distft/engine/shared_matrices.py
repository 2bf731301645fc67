"""Functions of whole matrices whose slices lie on several ranks, such as Muon's at ZeRO stages 1 to 3."""

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from distft.collectives import Collectives
from distft.optim.segments import MasterSlice


class SharedMatrices:
    """Each matrix has an owner, which gets its slices, computes, and sends the result's slices back.

    Two exchanges a step, of as many elements as a rank has. The owners share the work about evenly.
    """

    def __init__(
        self,
        slices: Iterable[MasterSlice],
        shapes: Mapping[str, tuple[int, ...]],
        collectives: Collectives,
        device: torch.device,
    ) -> None:
        """`slices`: this rank's, of the matrices with these `shapes`; `device`: for the work."""
        own = {one.parameter: (one.start, one.numel) for one in slices if one.parameter in shapes}
        self._layout = collectives.all_gather(own)  # by rank: parameter -> start, number of elements
        self._rank = collectives.rank
        self._shapes = dict(shapes)
        self._device = device
        self._owners = _owners(shapes, len(self._layout))
        # At stage 3 an update is of some matrices, of which every rank has a slice; otherwise of all.
        self._is_on_every_rank = all(ranks.keys() == shapes.keys() for ranks in self._layout)

    def __call__(self, own: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]) -> None:
        """Replace this rank's slices `own` by those of the function's values; called by all ranks."""
        names = [name for name in self._shapes if name in own or not self._is_on_every_rank]
        ranks = range(len(self._layout))
        # What goes to, and comes from, each rank: slices of the receiver's matrices, in the same order.
        sent = [[n for n in names if self._owners[n] == rank and n in own] for rank in ranks]
        mine = [name for name in names if self._owners[name] == self._rank]
        received = [[(n, *self._layout[rank][n]) for n in mine if n in self._layout[rank]] for rank in ranks]
        sent_sizes = [sum(own[name].numel() for name in part) for part in sent]
        received_sizes = [sum(numel for *_, numel in part) for part in received]
        outgoing = torch.cat(
            [torch.empty(0, device=self._device)]
            + [own[name].to(self._device) for part in sent for name in part]
        )
        incoming = torch.empty(sum(received_sizes), device=self._device)
        dist.all_to_all_single(incoming, outgoing, received_sizes, sent_sizes)
        places: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in mine}
        offset = 0
        for name, start, numel in (one for part in received for one in part):
            places[name].append((start, incoming.narrow(0, offset, numel)))
            offset += numel
        for name, parts in places.items():
            matrix = torch.cat([values for _, values in sorted(parts, key=lambda part: part[0])])
            result = function(matrix.view(self._shapes[name])).reshape(-1)
            for start, values in parts:
                values.copy_(result.narrow(0, start, values.numel()))
        dist.all_to_all_single(outgoing, incoming, sent_sizes, received_sizes)
        in_order = [own[name] for part in sent for name in part]
        for values, result in zip(
            in_order, torch.split(outgoing, [one.numel() for one in in_order]), strict=True
        ):
            values.copy_(result)


def _owners(shapes: Mapping[str, tuple[int, ...]], num_ranks: int) -> dict[str, int]:
    """The rank that computes each matrix: the costliest first, each to the rank with the least so far."""
    loads = [0] * num_ranks
    owners = {}
    for name, (rows, columns) in sorted(shapes.items(), key=lambda item: -_cost(*item[1])):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += _cost(rows, columns)
    return owners


def _cost(rows: int, columns: int) -> int:
    return rows * columns * min(rows, columns)
