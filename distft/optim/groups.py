"""Parameters that one optimizer treats alike."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from distft.errors import ConfigError
from distft.optim.adamw import AdamWConfig
from distft.optim.patterns import matching, no_match


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Trainable parameters with the same decay, rate and past."""

    names: tuple[str, ...]  # in the model's order
    weight_decay: float
    lr_scale: float  # multiple of the run's learning rate
    updates: int  # optimizer updates that these parameters have already had, for the bias correction


def parameter_groups(
    named_shapes: Mapping[str, tuple[int, ...]],
    trainable: Collection[str],
    config: AdamWConfig,
    updates: Mapping[str, int],
) -> list[ParameterGroup]:
    """Sort the trainable parameters of a model into groups, the same ones in the same order every time.

    Weight decay is for matrices: what has two dimensions or more and is no embedding table (a name with
    `embed` in it), unless `decay_embeddings`. A parameter that `updates` does not know has had none. Groups
    and names within them stand in the order of `named_shapes`.

    Raises `ConfigError` for every pattern of `lr_scales` that matches no parameter, frozen ones included.
    """
    names = list(named_shapes)
    faults = [
        no_match("optim.lr_scales", pattern, names)
        for pattern in config.lr_scales
        if not matching(pattern, names)
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    members: dict[tuple[float, float, int], list[str]] = {}
    for name, shape in named_shapes.items():
        if name in trainable:
            decay = config.weight_decay if decays(name, shape, config) else 0.0
            key = (decay, _lr_scale(name, config), updates.get(name, 0))
            members.setdefault(key, []).append(name)
    return [ParameterGroup(tuple(group), *key) for key, group in members.items()]


def decays(name: str, shape: tuple[int, ...], config: AdamWConfig) -> bool:
    """Whether weight decay is for this parameter."""
    return len(shape) >= 2 and (config.decay_embeddings or "embed" not in name.lower())


def _lr_scale(name: str, config: AdamWConfig) -> float:
    scales = [scale for pattern, scale in config.lr_scales.items() if fnmatchcase(name, pattern)]
    return scales[-1] if scales else 1.0
