"""A matrix product of a model, as the counts of FLOPs see it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product per token: `name` begins the weight's name, `before` those of parameters before it."""

    name: str
    numel: float  # multiply-adds per token
    before: tuple[str, ...] = ()
    flops_per_pair: int = 0  # of the attention that follows it
    before_alone: tuple[str, ...] = ()  # like `before`, but before none of the products that follow
