"""Ranks and their axes."""

from itertools import product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.errors import ConfigError
from distft.topology import Axis, RankAxes, Topology

SIZES = st.integers(1, 4)


@given(pipeline=SIZES, data=SIZES, sequence=SIZES, tensor=SIZES)
def test_every_combination_of_positions_belongs_to_exactly_one_rank(
    pipeline: int, data: int, sequence: int, tensor: int
) -> None:
    axes = RankAxes(pipeline=pipeline, data=data, sequence=sequence, tensor=tensor)
    found = [tuple(axes.position(axis, rank) for axis in get_args(Axis)) for rank in range(axes.world_size)]
    assert found == list(product(range(pipeline), range(data), range(sequence), range(tensor)))


def test_all_ranks_of_a_launcher_are_data_parallel() -> None:
    topology = Topology.from_env({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"})
    assert topology.axes == RankAxes(data=4)
    assert topology.axes.position("data", topology.rank) == 2
    assert topology.axes.position("tensor", topology.rank) == 0


def test_half_a_launch_environment_is_refused() -> None:
    with pytest.raises(ConfigError, match="RANK set, but not LOCAL_RANK, WORLD_SIZE"):
        Topology.from_env({"RANK": "0"})
