"""What objectives have in common whose head reads one vector a row: how a row's hidden states become it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from distft.model.config import ModelConfig, Pooling, check_pooling
from distft.objective.interface import Objective

if TYPE_CHECKING:
    from distft.data.feed import AnyFeed


class PooledObjective(Objective):
    """An objective with a head over pooled hidden states."""

    # Of a row's hidden states; null: last of a causal model, whose last token has seen all others, first of a
    # vit with a class token, else mean.
    pooling: Pooling | None = None

    def check_model(self, model: ModelConfig) -> None:
        if self.pooling is not None:
            check_pooling(self.pooling, model)

    def resolved(self, model: ModelConfig, train: AnyFeed | None) -> Self:
        own = super().resolved(model, train)
        if self.pooling is not None:
            return own
        return own.model_copy(update={"pooling": model.default_pooling})

    @property
    def head_pooling(self) -> Pooling:
        """`pooling`; of an objective that is not `resolved`, mean."""
        return self.pooling or "mean"
