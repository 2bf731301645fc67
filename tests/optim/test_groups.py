import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.errors import ConfigError
from distft.optim.adamw import AdamWConfig
from distft.optim.groups import ParameterGroup, parameter_groups

SHAPES = {
    "embed.weight": (100, 8),
    "blocks.0.norm.weight": (8,),
    "blocks.0.attention.q.weight": (8, 8),
    "blocks.0.attention.q.bias": (8,),
    "blocks.1.attention.q.weight": (8, 8),
    "head.weight": (100, 8),
}
CONFIG = AdamWConfig(weight_decay=0.1)
RULE = CONFIG.rule


def test_only_matrices_decay_and_embeddings_only_if_configured() -> None:
    matrices = ("blocks.0.attention.q.weight", "blocks.1.attention.q.weight", "head.weight")
    rest = ("embed.weight", "blocks.0.norm.weight", "blocks.0.attention.q.bias")
    assert parameter_groups(SHAPES, SHAPES.keys(), CONFIG, {}) == [
        ParameterGroup(rest, 0.0, 1.0, 0, RULE),
        ParameterGroup(matrices, 0.1, 1.0, 0, RULE),
    ]
    decaying = parameter_groups(
        SHAPES, SHAPES.keys(), CONFIG.model_copy(update={"decay_embeddings": True}), {}
    )
    assert decaying[0] == ParameterGroup(("embed.weight", *matrices), 0.1, 1.0, 0, RULE)


@given(
    trainable=st.sets(st.sampled_from(list(SHAPES))),
    updates=st.dictionaries(st.sampled_from(list(SHAPES)), st.integers(0, 3)),
    scale=st.sampled_from([1.0, 0.5]),
    decay_embeddings=st.booleans(),
)
def test_every_trainable_parameter_is_in_exactly_one_group_with_its_own_settings(
    trainable: set[str], updates: dict[str, int], scale: float, decay_embeddings: bool
) -> None:
    config = AdamWConfig(lr_scales={"blocks.*": 0.1, "*q*": scale}, decay_embeddings=decay_embeddings)
    groups = parameter_groups(SHAPES, trainable, config, updates)
    names = [name for group in groups for name in group.names]
    assert len(names) == len(trainable)
    assert set(names) == trainable
    keys = [(group.weight_decay, group.lr_scale, group.updates) for group in groups]
    assert len(set(keys)) == len(keys)
    for group in groups:
        assert list(group.names) == [name for name in SHAPES if name in group.names]
        for name in group.names:
            is_embedding = name == "embed.weight"
            decays = len(SHAPES[name]) == 2 and (decay_embeddings or not is_embedding)
            assert group.weight_decay == (config.weight_decay if decays else 0.0)
            assert group.updates == updates.get(name, 0)
            assert group.lr_scale == (scale if "q" in name else 0.1 if "blocks" in name else 1.0)


def test_parameters_with_different_update_counts_are_in_different_groups() -> None:
    updates = {name: 50 for name in SHAPES if "blocks.1" in name}
    groups = parameter_groups(SHAPES, SHAPES.keys(), CONFIG, updates)
    assert [group.names for group in groups if group.updates == 50] == [("blocks.1.attention.q.weight",)]


def test_one_error_lists_all_scale_patterns_without_a_match_and_similar_names() -> None:
    config = AdamWConfig(lr_scales={"block.*.attn*": 0.1, "hed.weight": 2.0, "embed*": 0.5})
    with pytest.raises(ConfigError) as raised:
        parameter_groups(SHAPES, SHAPES.keys(), config, {})
    first, second = str(raised.value).splitlines()
    assert "'block.*.attn*'" in first
    assert "'blocks.0.attention.q" in first
    assert "'hed.weight'" in second
    assert "'head.weight'" in second


def test_a_scale_pattern_may_match_frozen_parameters_only() -> None:
    config = AdamWConfig(lr_scales={"embed*": 0.1})
    groups = parameter_groups(SHAPES, {"head.weight"}, config, {})
    assert groups == [ParameterGroup(("head.weight",), 0.1, 1.0, 0, RULE)]
