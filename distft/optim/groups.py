"""Parameter groups: trainable parameters that share weight decay, learning rate, update count and states."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

from distft.config import Widths
from distft.errors import ConfigError
from distft.optim.patterns import block_of, matching_names, no_match_message
from distft.optim.settings import OptimizerSettings, UpdateRule

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Trainable parameters that the optimizer updates alike."""

    names: tuple[str, ...]  # in the model's order
    weight_decay: float
    lr_scale: float  # multiple of the run's learning rate
    updates: int  # optimizer updates so far, for Adam's bias correction
    rule: UpdateRule


def parameter_groups(
    named_shapes: Mapping[str, tuple[int, ...]],
    trainable: Collection[str],
    config: OptimizerSettings,
    updates: Mapping[str, int],
    widths: Widths | None = None,
) -> list[ParameterGroup]:
    """Group the trainable parameters; groups, and names in each, are in the order of `named_shapes`.

    Weight decay applies to parameters of two or more dimensions, but to embedding tables (`embed` in the
    name) only with `decay_embeddings`; a pattern of `weight_decays` overrules that. A name missing in
    `updates` has had none. `widths` multiply rates, and divide weight decays, so that a step decays weights
    as much at every width.

    Raises `ConfigError` that lists every pattern that matches neither a trainable nor a frozen parameter.
    """
    names = list(named_shapes)
    errors = [
        no_match_message(f"optim.{setting}", pattern, names)
        for setting, pattern in config.patterns()
        if not matching_names(pattern, names)
    ]
    if config.layer_decay is not None and not any(map(block_of, names)):
        errors.append(f"optim.layer_decay={config.layer_decay:g}: the model has no blocks; leave it out.")
    if errors:
        raise ConfigError("\n".join(errors))
    scales, decays = _by_name(config.lr_scales, names), _by_name(config.weight_decays, names)
    of_layers = layer_scales(names, config.layer_decay or 1.0)
    rules = config.rules(named_shapes)
    of_widths = width_scales(named_shapes, config, rules, widths)
    members: dict[tuple[float, float, int, UpdateRule], list[str]] = {}
    for name, shape in named_shapes.items():
        if name in trainable:
            default = config.weight_decay if has_weight_decay(name, shape, config) else 0.0
            lr_scale = scales.get(name, 1.0) * of_layers[name] * of_widths[name]
            decay = decays.get(name, default) / of_widths[name]
            key = (decay, lr_scale, updates.get(name, 0), rules[name])
            members.setdefault(key, []).append(name)
    return [ParameterGroup(tuple(group), *key) for key, group in members.items()]


def has_weight_decay(name: str, shape: tuple[int, ...], config: OptimizerSettings) -> bool:
    """Whether the optimizer's one weight decay applies to the parameter."""
    return len(shape) >= 2 and (config.decay_embeddings or "embed" not in name.lower())


def layer_scales(names: Collection[str], decay: float) -> dict[str, float]:
    """The multiple of the rate of each parameter, given all `names` in the model's order.

    As in ELECTRA and BEiT: block i of n has decay^(n - i), what comes before the blocks (embeddings)
    decay^(n + 1), and what comes behind them (the last norm, heads) 1. The blocks of a decoder follow those
    of its encoder. A head that is tied to the embedding table has its rate.
    """
    levels: dict[str, int] = {}  # 0: before the first block
    seen: dict[str, int] = {}
    for name in names:
        block = block_of(name)
        if block is not None:
            seen.setdefault(block, len(seen) + 1)
        levels[name] = len(seen) if block is None else seen[block]
    last_of_blocks = max((i for i, name in enumerate(names) if block_of(name) is not None), default=-1)
    top = len(seen) + 1
    for name in list(names)[last_of_blocks + 1 :]:
        levels[name] = top
    return {name: decay ** (top - level) for name, level in levels.items()}


def width_scales(
    names: Collection[str],
    config: OptimizerSettings,
    rules: Mapping[str, UpdateRule],
    widths: Widths | None,
) -> dict[str, float]:
    """The multiple of the rate of each parameter that its model's width asks for.

    Raises `ConfigError` for an optimizer, or a parameter of it, without a rule.
    """
    if widths is None:
        return dict.fromkeys(names, 1.0)
    powers = {
        (role, rule): config.width_power(role, rule)
        for role, rule in dict.fromkeys((widths.roles[name], rules[name]) for name in names)
    }
    without = [name for name in names if powers[widths.roles[name], rules[name]] is None]
    if without:
        raise ConfigError(
            f"model.parametrization=mup: optim.type={getattr(config, 'type', 'of your own')} has no rule for "
            f"the rate of {without[0]}"
            + (f" and {len(without) - 1} others" if without[1:] else "")
            + ". Set optim.type to adamw, lion or sgd (muon: with hidden matrices alone in optim.matrices), "
            "give your class the method width_power, or set model.parametrization=standard."
        )
    return {name: widths.ratio ** (powers[widths.roles[name], rules[name]] or 0.0) for name in names}


def _by_name(values: Mapping[str, _T], names: Collection[str]) -> dict[str, _T]:
    """The value of the last pattern that matches, by name."""
    return {name: value for pattern, value in values.items() for name in matching_names(pattern, names)}
