"""Settings of validation rows that are split off the training data: a share of them, or one of k folds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from distft.config import Settings
from distft.data.tokens import TokensConfig

if TYPE_CHECKING:
    from distft.data.feed import AnyFeed, Feed


class SplitConfig(Settings):
    """Rows of the training data that validate and do not train: a share of them, or one of `num_folds`.

    Which rows these are is a function of `split_seed`, the rows' numbers and their content: rows of equal
    inputs stay together, and of labelled rows each label has its share. The `num_folds` runs of one
    configuration that differ in `fold` hold out each row once.
    """

    type: Literal["split"] = "split"
    share: float | None = Field(None, gt=0, lt=1)
    num_folds: int | None = Field(None, ge=2, le=1000)  # in place of share
    fold: int | None = Field(None, ge=0)  # which one is held out, from 0
    split_seed: int = Field(0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.share is None) == (self.num_folds is None):
            raise ValueError("set either share, such as 0.1, or num_folds and fold")
        if (self.num_folds is None) != (self.fold is None):
            raise ValueError("num_folds and fold go together: set both, or share alone")
        if self.num_folds is not None and self.fold is not None and self.fold >= self.num_folds:
            raise ValueError(
                f"fold={self.fold} of num_folds={self.num_folds}: folds are counted from 0 to "
                f"{self.num_folds - 1}"
            )
        return self

    def split(self, train: AnyFeed) -> tuple[Feed, Feed]:
        """The rows of `train` that train, in an order of their own, and those that validate, in file order.

        Raises `ConfigError` for data of several sources, `DataError` for too few different rows.
        """
        from distft.data.split_rows import split_feed

        return split_feed(train, self)

    @property
    def description(self) -> str:
        """The settings in a line for the log."""
        part = f"share {self.share:g}" if self.share is not None else f"fold {self.fold} of {self.num_folds}"
        return f"{part}, split_seed {self.split_seed}"


def split_problem(data: Any, validation: Any) -> str | None:
    """Why nothing can be split off `data`; None if it can, or `validation` is no split."""
    if isinstance(validation, SplitConfig) and isinstance(data, TokensConfig):
        return (
            "validation.type=split with data.type=tokens: a row of token shards has parts of documents that "
            "go on in others. `distft tokenize --holdout` holds out whole documents: name its validation/"
        )
    return None
