"""DeepSpeed's layout has every element exactly once, for any sizes and ranks; names of its parameters."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distft.checkpoint.formats.deepspeed.layout import (
    Span,
    stage3_partition_numel,
    stage3_spans,
    stage12_partition_numel,
    stage12_spans,
    sub_groups,
)
from distft.checkpoint.formats.deepspeed.stage0_reader import assign_names

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def _elements(spans: Sequence[Span]) -> list[tuple[str, int]]:
    return [(span.parameter, i) for span in spans if span.parameter for i in range(span.start, span.stop)]


def _named(numels: Sequence[int]) -> dict[str, int]:
    return {f"p{i}": numel for i, numel in enumerate(numels)}


@given(sizes, st.integers(1, 5))
def test_partitions_of_a_flat_group_contain_each_element_once_in_order(
    numels: list[int], world_size: int
) -> None:
    named = _named(numels)
    size = stage12_partition_numel(named, world_size)
    partitions = [list(stage12_spans(named, rank * size, (rank + 1) * size)) for rank in range(world_size)]
    assert all(sum(span.numel for span in spans) == size for spans in partitions)
    found = [element for spans in partitions for element in _elements(spans)]
    assert found == [(name, i) for name, numel in named.items() for i in range(numel)]


@given(sizes, st.integers(0, 7))
def test_padding_between_parameters_shifts_the_following_ones(numels: list[int], padding: int) -> None:
    named = _named(numels)
    total = sum(numels) + padding * len(numels)
    spans = list(stage12_spans(named, 0, total, [padding] * len(numels)))
    assert sum(span.numel for span in spans) == total
    positions, position = {}, 0
    for span in spans:
        if span.parameter:
            positions[span.parameter] = position
        position += span.numel
    expected = [sum(numels[:i]) + i * padding for i in range(len(numels))]
    assert list(positions.values()) == expected


@given(sizes, st.integers(1, 5))
def test_partitions_of_stage_3_contain_each_element_once_and_have_equal_sizes(
    numels: list[int], world_size: int
) -> None:
    named = _named(numels)
    by_rank = [list(stage3_spans(named, rank, world_size)) for rank in range(world_size)]
    assert len({sum(span.numel for span in spans) for spans in by_rank}) == 1
    found = [element for spans in by_rank for element in _elements(spans)]
    assert sorted(found) == sorted((name, i) for name, numel in named.items() for i in range(numel))


@given(sizes, st.integers(1, 3), st.integers(1, 60))
def test_a_sub_group_ends_as_soon_as_it_has_its_size(
    numels: list[int], world_size: int, sub_group_size: int
) -> None:
    named = _named(numels)
    groups = sub_groups(named, world_size, sub_group_size)
    assert [name for group in groups for name in group] == list(named)
    sizes_by_group = [
        [stage3_partition_numel(numel, world_size) for numel in group.values()] for group in groups
    ]
    assert all(sum(group[:-1]) < sub_group_size for group in sizes_by_group)
    assert all(sum(group) >= sub_group_size for group in sizes_by_group[:-1])


class ShapesOnly:
    """A group whose parameters are known by shape only."""

    def __init__(self, model: dict[str, tuple[int, ...]], shapes: list[tuple[int, ...] | None]) -> None:
        self._model, self._shapes = model, shapes
        self.end = len(shapes)

    def size(self, name: str) -> int:  # noqa: ARG002
        return 1

    def fits(self, name: str, position: int) -> bool:
        return self._shapes[position] in (self._model[name], None)


MODEL = {f"{layer}.{kind}": (2, 2) if kind == "w" else (2,) for layer in "abc" for kind in ("w", "b")}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([[(2, 2)] * 3, [(2,)] * 3], [["a.w", "b.w", "c.w"], ["a.b", "b.b", "c.b"]]),
        ([[(2, 2), (2,)] * 3], [list(MODEL)]),
        ([[None] * 6], [list(MODEL)]),
        ([[(2, 2), (2,)] * 2], "several orders fit"),  # one layer is frozen, but any of the three could be
        ([[(2, 2)], [(2, 2), (2,), (2,)] * 1], "several orders fit"),
        ([[(2, 2)] * 4], "do not fit in the model's order"),
        ([[(3, 3)]], "do not fit in the model's order"),
    ],
)
def test_names_are_assigned_only_if_exactly_one_order_fits(
    shapes: list[list[tuple[int, ...] | None]], expected: list[list[str]] | str
) -> None:
    groups = [ShapesOnly(MODEL, group) for group in shapes]
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            assign_names(list(MODEL), groups)
    else:
        assert assign_names(list(MODEL), groups) == expected


def test_names_of_a_deep_model_with_equal_layers_are_assigned() -> None:
    model = {f"{i}.{kind}": torch.Size((4, 4) if kind == "w" else (4,)) for i in range(400) for kind in "wb"}
    matrices, vectors = list(model)[::2], list(model)[1::2]
    groups = [ShapesOnly(dict(model), [(4, 4)] * 400), ShapesOnly(dict(model), [(4,)] * 400)]
    assert assign_names(list(model), groups) == [matrices, vectors]
