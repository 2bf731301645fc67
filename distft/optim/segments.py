"""One optimizer over master weights that lie in flat buffers, however its groups cut them.

A ZeRO engine keeps its part of all trainable parameters in one buffer (or a few, at stage 3). Every run of
neighbours in it that belongs to one parameter group is a segment, and torch's optimizer updates segments. So
many rates cost many short segments, not a buffer, a reduction and a gather for each of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from distft.optim.groups import ParameterGroup
from distft.optim.kernels import STEP
from distft.optim.settings import OptimizerSettings


@dataclass(frozen=True, slots=True)
class MasterSlice:
    """Where this rank keeps fp32 master weights of a parameter, from flat element `start` on."""

    parameter: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    flat: Tensor  # the buffer that has them; its gradient has theirs
    offset: int  # of the first one in `flat`, flattened
    numel: int

    @property
    def values(self) -> Tensor:
        """A 1-D view of live memory."""
        return self.flat.detach().view(-1).narrow(0, self.offset, self.numel)


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring elements of one buffer that belong to one group, padding between and behind included."""

    flat: Tensor
    offset: int
    values: Tensor  # 1-D, a view; what torch's optimizer updates
    slices: tuple[MasterSlice, ...]


class SegmentedOptimizer:
    """The update of this rank's master weights, and its states."""

    def __init__(
        self, slices: Iterable[MasterSlice], groups: Sequence[ParameterGroup], optim: OptimizerSettings
    ) -> None:
        self._groups = list(groups)
        number = {name: index for index, group in enumerate(groups) for name in group.names}
        self._by_flat: dict[int, list[Segment]] = {}
        by_group: list[list[Segment]] = [[] for _ in groups]
        for segment in _segments(slices, groups, number):
            self._by_flat.setdefault(id(segment.flat), []).append(segment)
            by_group[number[segment.slices[0].parameter]].append(segment)
        self.kernel = optim.build(by_group, groups)
        for segments, group in zip(by_group, groups, strict=True):
            for segment in segments:
                values = segment.values
                step = torch.full((), float(group.updates), device=values.device)
                zeros = {moment: torch.zeros_like(values) for moment in group.rule.moments}
                self.kernel.state[values] = {STEP: step, **zeros}

    def set_lr(self, group_lr: Callable[[ParameterGroup], float]) -> None:
        """The learning rates of the next update."""
        for group, settings in zip(self._groups, self.kernel.param_groups, strict=True):
            settings["lr"] = group_lr(group)

    def update(self, flats: Iterable[Tensor]) -> None:
        """Update the elements of these buffers by the buffers' gradients, which it may overwrite."""
        segments = [segment for flat in flats for segment in self._by_flat.get(id(flat), ())]
        for segment in segments:
            assert segment.flat.grad is not None
            gradient = segment.flat.grad.reshape(-1)
            segment.values.grad = gradient.narrow(0, segment.offset, segment.values.numel())
        self.kernel.step()
        for segment in segments:
            segment.values.grad = None

    def states(self) -> Iterator[tuple[MasterSlice, Mapping[str, Tensor], Tensor]]:
        """Each slice with views of its states and its count of updates (a scalar on the device)."""
        for segment in (segment for segments in self._by_flat.values() for segment in segments):
            found = self.kernel.state[segment.values]
            for own in segment.slices:
                start = own.offset - segment.offset
                moments = {
                    name: values.narrow(0, start, own.numel) for name, values in found.items() if name != STEP
                }
                yield own, moments, found[STEP]

    def close(self) -> None:
        """Free the states."""
        self.kernel.state.clear()


def _segments(
    slices: Iterable[MasterSlice], groups: Sequence[ParameterGroup], number: Mapping[str, int]
) -> Iterator[Segment]:
    by_flat: dict[int, list[MasterSlice]] = {}
    for own in slices:
        by_flat.setdefault(id(own.flat), []).append(own)

    def key(own: MasterSlice) -> tuple[int, str]:
        group = number[own.parameter]
        return group, own.parameter if groups[group].rule.is_by_matrix else ""

    for members in by_flat.values():
        members.sort(key=lambda own: own.offset)
        runs = [tuple(run) for _, run in groupby(members, key)]
        flat = members[0].flat
        starts = [run[0].offset for run in runs]
        for run, start, stop in zip(runs, starts, [*starts[1:], flat.numel()], strict=True):
            yield Segment(flat, start, flat.detach().view(-1).narrow(0, start, stop - start), run)
