"""Prefix language modelling: next tokens behind a prefix that the model reads in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distft.data.dataset import Labels, TransformContext
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.model.heads import Heads
from distft.objective.interface import Passes
from distft.objective.language_model import (
    LanguageModelObjective,
    first_row,
    require_no_labels,
    require_targets_behind_prefix,
    require_transformer,
)

if TYPE_CHECKING:
    from distft.data.feed import Transform


class PrefixLM(LanguageModelObjective):
    """Cross entropy of the tokens behind each document's prefix (Raffel et al. 2019, arXiv:1910.10683).

    Attention is causal, but all tokens of a prefix attend to each other. An encoder with a decoder has the
    prefix in the encoder.
    """

    type: Literal["prefix_lm"] = "prefix_lm"
    # random: a random share of each document; prompt: all before the first target, for data.type=completion
    prefix: Literal["random", "prompt"] = "random"
    min_prefix_share: float = Field(0.0, ge=0, lt=1)  # of a document's tokens
    max_prefix_share: float = Field(1.0, gt=0, le=1)

    has_few_targets: ClassVar[bool] = True

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.min_prefix_share > self.max_prefix_share:
            raise ValueError(
                f"min_prefix_share={self.min_prefix_share} is more than "
                f"max_prefix_share={self.max_prefix_share}: exchange them."
            )
        if self.prefix == "prompt" and (self.min_prefix_share, self.max_prefix_share) != (0.0, 1.0):
            raise ValueError(
                "min_prefix_share and max_prefix_share have no effect with prefix: prompt: leave them out."
            )
        return self

    def heads(self, label_names: Labels) -> Heads:
        """`lm_head`. Raises `ConfigError` for labelled data."""
        require_no_labels(label_names, self.type)
        return super().heads(label_names)

    @property
    def passes(self) -> Passes:
        """How long prompts are is not known; of these every position counts."""
        is_random = self.prefix == "random"
        share = (self.min_prefix_share + self.max_prefix_share) / 2 if is_random else 0.0
        return Passes(logits_share=1 - share)

    def check_model(self, model: ModelConfig) -> None:
        if not model.is_encoder_decoder:
            require_transformer(
                model, self.type, "of the others only encoder_decoder reads a prefix in both directions"
            )
        require_targets_behind_prefix(model, self.type)

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        from distft.data.prefixes import PrefixMarker

        row = first_row(context, self.type)
        if self.prefix == "prompt" and row.lengths is None:
            raise ConfigError(
                "objective.prefix=prompt: these rows are packed documents without prompts. Set "
                "objective.prefix=random, or data.type=completion."
            )
        return (
            PrefixMarker(
                seed=context.seed,
                min_share=self.min_prefix_share,
                max_share=self.max_prefix_share,
                is_prompt=self.prefix == "prompt",
                token_bytes=context.data.token_bytes,
            ),
        )
