"""Where elements lie: each once and only once, for any sizes and numbers of ranks."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distft.checkpoint.formats.deepspeed_layout import (
    Run,
    flat_partition_numel,
    flat_runs,
    slice_numel,
    sliced_runs,
    sub_groups,
)
from distft.checkpoint.formats.unnamed_parameters import assign_names

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def _elements(runs: Sequence[Run]) -> list[tuple[str, int]]:
    return [(run.parameter, i) for run in runs if run.parameter for i in range(run.start, run.stop)]


def _named(numels: Sequence[int]) -> dict[str, int]:
    return {f"p{i}": numel for i, numel in enumerate(numels)}


@given(sizes, st.integers(1, 5))
def test_partitions_of_a_flat_group_hold_each_element_once_in_order(
    numels: list[int], world_size: int
) -> None:
    named = _named(numels)
    size = flat_partition_numel(named, world_size)
    partitions = [list(flat_runs(named, rank * size, (rank + 1) * size)) for rank in range(world_size)]
    assert all(sum(run.numel for run in runs) == size for runs in partitions)
    found = [element for runs in partitions for element in _elements(runs)]
    assert found == [(name, i) for name, numel in named.items() for i in range(numel)]


@given(sizes, st.integers(0, 7))
def test_paddings_between_parameters_shift_what_follows(numels: list[int], padding: int) -> None:
    named = _named(numels)
    total = sum(numels) + padding * len(numels)
    runs = list(flat_runs(named, 0, total, [padding] * len(numels)))
    assert sum(run.numel for run in runs) == total
    places, position = {}, 0
    for run in runs:
        if run.parameter:
            places[run.parameter] = position
        position += run.numel
    expected = [sum(numels[:i]) + i * padding for i in range(len(numels))]
    assert list(places.values()) == expected


@given(sizes, st.integers(1, 5))
def test_slices_hold_each_element_once_and_all_ranks_as_many(numels: list[int], world_size: int) -> None:
    named = _named(numels)
    by_rank = [list(sliced_runs(named, rank, world_size)) for rank in range(world_size)]
    assert len({sum(run.numel for run in runs) for runs in by_rank}) == 1
    found = [element for runs in by_rank for element in _elements(runs)]
    assert sorted(found) == sorted((name, i) for name, numel in named.items() for i in range(numel))


@given(sizes, st.integers(1, 3), st.integers(1, 60))
def test_sub_groups_end_when_they_are_full(numels: list[int], world_size: int, most: int) -> None:
    named = _named(numels)
    groups = sub_groups(named, world_size, most)
    assert [name for group in groups for name in group] == list(named)
    filled = [[slice_numel(numel, world_size) for numel in group.values()] for group in groups]
    assert all(sum(group[:-1]) < most for group in filled)
    assert all(sum(group) >= most for group in filled[:-1])


class Shapes:
    """A group of which the shapes alone are known."""

    def __init__(self, model: dict[str, tuple[int, ...]], shapes: list[tuple[int, ...] | None]) -> None:
        self._model, self._shapes = model, shapes
        self.end = len(shapes)

    def place_after(self, place: int, name: str) -> int | None:
        fits = place < self.end and self._shapes[place] in (self._model[name], None)
        return place + 1 if fits else None

    def room(self, name: str) -> int:  # noqa: ARG002
        return 1


MODEL = {f"{layer}.{kind}": (2, 2) if kind == "w" else (2,) for layer in "abc" for kind in ("w", "b")}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([[(2, 2)] * 3, [(2,)] * 3], [["a.w", "b.w", "c.w"], ["a.b", "b.b", "c.b"]]),
        ([[(2, 2), (2,)] * 3], [list(MODEL)]),
        ([[None] * 6], [list(MODEL)]),
        ([[(2, 2), (2,)] * 2], "several orders fit"),  # one layer is frozen, and nobody knows which
        ([[(2, 2)], [(2, 2), (2,), (2,)] * 1], "several orders fit"),
        ([[(2, 2)] * 4], "no order"),
        ([[(3, 3)]], "no order"),
    ],
)
def test_names_are_found_where_only_one_order_fits_and_else_refused(
    shapes: list[list[tuple[int, ...] | None]], expected: list[list[str]] | str
) -> None:
    groups = [Shapes(MODEL, group) for group in shapes]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            assign_names(list(MODEL), groups)
    else:
        assert assign_names(list(MODEL), groups) == expected


def test_a_deep_model_of_equal_layers_is_sorted_in_no_time() -> None:
    model = {f"{i}.{kind}": torch.Size((4, 4) if kind == "w" else (4,)) for i in range(400) for kind in "wb"}
    matrices, vectors = list(model)[::2], list(model)[1::2]
    groups = [Shapes(dict(model), [(4, 4)] * 400), Shapes(dict(model), [(4,)] * 400)]
    assert assign_names(list(model), groups) == [matrices, vectors]
