import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config import Widths, parse
from distft.errors import ConfigError
from distft.optim.adamw import AdamWConfig
from distft.optim.config import OptimConfig
from distft.optim.groups import ParameterGroup, layer_scales, parameter_groups
from distft.optim.muon import MuonConfig
from distft.optim.settings import OptimizerSettings

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


def test_layer_decay_is_that_of_electra_and_beit() -> None:
    names = [
        "embed.weight",
        "embed_norm.weight",
        "blocks.0.q.weight",
        "blocks.1.q.weight",
        "blocks.1.q.bias",
        "norm.weight",
        "classifier.weight",
    ]
    scales = layer_scales(names, 0.5)
    assert list(scales.values()) == [0.125, 0.125, 0.25, 0.5, 0.5, 1.0, 1.0]
    assert set(layer_scales(names, 1.0).values()) == {1.0}


def test_the_blocks_of_a_decoder_follow_those_of_its_encoder() -> None:
    names = ["embed.weight", "encoder.bias.weight", "encoder.blocks.0.q.weight", "encoder.norm.weight"]
    names += ["decoder.bias.weight", "decoder.blocks.0.q.weight", "decoder.norm.weight"]
    assert list(layer_scales(names, 0.5).values()) == [0.125, 0.125, 0.25, 0.25, 0.25, 0.5, 1.0]


def test_layer_decay_multiplies_other_scales_and_the_last_weight_decay_counts() -> None:
    config = AdamWConfig(
        layer_decay=0.5,
        lr_scales={"*q*": 0.1},
        weight_decays={"*": 0.3, "*norm*": 0.0, "*q.bias": 0.2},
    )
    groups = parameter_groups(SHAPES, SHAPES, config, {})
    found = {name: (group.lr_scale, group.weight_decay) for group in groups for name in group.names}
    assert found == {
        "embed.weight": (0.125, 0.3),
        "blocks.0.norm.weight": (0.25, 0.0),
        "blocks.0.attention.q.weight": (0.025, 0.3),
        "blocks.0.attention.q.bias": (0.025, 0.2),
        "blocks.1.attention.q.weight": (0.05, 0.3),
        "head.weight": (1.0, 0.3),
    }


def test_patterns_without_a_match_and_a_decay_without_blocks_are_one_error() -> None:
    config = parse(
        OptimConfig,
        {"type": "muon", "matrices": ["layers.*"], "weight_decays": {"nrom*": 0.1}, "layer_decay": 0.9},
    )
    with pytest.raises(ConfigError) as raised:
        parameter_groups({"embed.weight": (3, 2), "norm.weight": (2,)}, {"norm.weight"}, config, {})
    message = str(raised.value)
    assert "optim.matrices: pattern 'layers.*'" in message
    assert "optim.weight_decays: pattern 'nrom*'" in message
    assert "optim.layer_decay=0.9: the model has no blocks" in message


def test_settings_without_a_type_are_adamw_and_nesterov_needs_momentum() -> None:
    assert type(parse(OptimConfig, {"peak_lr": 0.1})) is AdamWConfig
    with pytest.raises(ConfigError, match="nesterov=true needs a momentum"):
        parse(OptimConfig, {"type": "sgd", "nesterov": True, "momentum": 0.0})
    with pytest.raises(ConfigError, match="adamw, lion, sgd, muon"):
        parse(OptimConfig, {"type": "adam"})


class WithoutRule(OptimizerSettings):
    """An optimizer outside distft that was written before `width_power`."""

    rule = AdamWConfig.rule  # type: ignore[assignment]
    group_settings = AdamWConfig.group_settings
    build = AdamWConfig.build


def test_a_width_scales_rates_and_keeps_what_a_step_decays_and_needs_a_rule() -> None:
    shapes = {"embed.weight": (5, 8), "blocks.0.up.weight": (8, 8), "norm.weight": (8,)}
    widths = Widths(4.0, {"embed.weight": "input", "blocks.0.up.weight": "hidden", "norm.weight": "input"})
    config = AdamWConfig(weight_decay=0.1, lr_scales={"blocks.*": 0.5})
    found = {
        g.names: (g.lr_scale, g.weight_decay) for g in parameter_groups(shapes, shapes, config, {}, widths)
    }
    assert found == {("embed.weight", "norm.weight"): (1.0, 0.0), ("blocks.0.up.weight",): (0.125, 0.4)}
    with pytest.raises(ConfigError, match=r"no rule for the rate of embed.weight and 2 others.*width_power"):
        parameter_groups(shapes, shapes, WithoutRule(), {}, widths)


@pytest.mark.parametrize("update_scale", ["adamw", "spectral"])
@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_muons_update_has_the_same_spectral_norm_at_every_width(
    update_scale: str, shape: tuple[int, int]
) -> None:
    """An orthogonal matrix has 1, times its scale and the rate (Yang et al. 2023, arXiv:2310.17813)."""
    config = MuonConfig.model_validate({"update_scale": update_scale})
    rule = config.rules({"blocks.0.up.weight": shape})["blocks.0.up.weight"]
    power = config.width_power("hidden", rule)
    assert power is not None
    rows, columns = shape
    assert config.scale((8 * rows, 8 * columns)) * 8**power == pytest.approx(config.scale(shape))
    assert config.width_power("input", rule) is None
