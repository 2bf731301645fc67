"""Maximal update parametrization of a Transformer: which parameters grow, initial weights, attention's scale.

Yang et al. 2022, "Tensor Programs V" (arXiv:2203.03466), table 8, for embeddings, hidden matrices and a tied
table of logits. Outputs that are not tied (an lm_head, classifiers, routers) have the equivalent of table 3:
no multiplier, but smaller initial weights and rates. Rates are the optimizer's: `width_power`.
"""

from collections.abc import Mapping
from math import sqrt

from distft.config import WidthRole, Widths
from distft.model.lora_config import A, B

_POWERS: dict[WidthRole, float] = {"input": 0.0, "hidden": -0.5, "output": -1.0, "finite": 0.0}  # of std
_TABLES = ("embed", "position_embed", "segment_embed")
_FINITE_NORMS = ("q_norm", "k_norm")  # over head_dim
_ROUTING = ("router", "shared_gate")


def mup_problems(parametrization: str, base_d_model: int | None, base_head_dim: int | None) -> list[str]:
    """Settings of a Transformer that do not belong together."""
    given = {"mup_base_d_model": base_d_model, "mup_base_head_dim": base_head_dim}
    if parametrization == "mup":
        what = {
            "mup_base_d_model": "the d_model of the model whose rate you know",
            "mup_base_head_dim": "the head_dim of the model whose rate you know, which is this one's if "
            "wider models have more heads",
        }
        return [f"parametrization=mup needs {name}: {what[name]}." for name in given if given[name] is None]
    return [
        f"{name}={value} has no effect: set parametrization: mup, or leave it out."
        for name, value in given.items()
        if value is not None
    ]


def attention_scale(head_dim: int, base_head_dim: int | None) -> float | None:
    """1 / head_dim, times what makes it 1 / sqrt(head_dim) at the base; None: it is 1 / sqrt(head_dim)."""
    if base_head_dim is None or base_head_dim == head_dim:
        return None
    return sqrt(base_head_dim) / head_dim


def mup_std(name: str, shape: tuple[int, ...], std: float, ratio: float) -> float:
    """Standard deviation of a matrix that has `std` at the base width: by its fan-in over the base's."""
    factor: float = ratio ** _POWERS[width_role(name, shape)]
    return std * factor


def mup_widths(named_shapes: Mapping[str, tuple[int, ...]], ratio: float) -> Widths:
    return Widths(ratio, {name: width_role(name, shape) for name, shape in named_shapes.items()})


def width_role(name: str, shape: tuple[int, ...]) -> WidthRole:
    """Which sides of a Transformer's parameter grow with its width."""
    *modules, last = name.split(".")
    is_in_block = modules[:1] == ["blocks"]
    owner = modules[-1] if modules else ""
    # A head, such as `classifier`, may have parameters of its own, or parts: `classifier.hidden`.
    is_part = len(modules) > 1
    if last == A:
        return "output"
    if last == B:
        return "input"
    if len(shape) == 1:
        is_of_outputs = last == "bias" and not is_in_block and (not is_part or owner == "output")
        is_finite = owner in _FINITE_NORMS or last in {"log_temperature", "selection_bias"}
        is_norm = owner in {"norm", "embed_norm"} and not is_part
        return "finite" if is_finite or (is_of_outputs and not is_norm) else "input"
    if owner in _TABLES and not is_part:
        return "input"
    if is_in_block:
        return "output" if owner in _ROUTING else "hidden"
    return "hidden" if is_part and owner in {"dense", "hidden"} else "output"
