"""What an optimizer must know of a model's width to keep the best rate where it is (muP)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

# Which sides of a parameter grow with the width. input: its outputs (embeddings, norms, biases, and a tied
# table, whose logits the model divides by the ratio); hidden: both; output: its inputs (classifiers,
# routers); finite: none.
WidthRole: TypeAlias = Literal["input", "hidden", "output", "finite"]


@dataclass(frozen=True, slots=True)
class Widths:
    """The model's width as a multiple of its base width, and the role of each parameter."""

    ratio: float
    roles: Mapping[str, WidthRole]
