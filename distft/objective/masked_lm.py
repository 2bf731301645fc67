"""Masked language modelling: predicts tokens that were hidden, from both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from distft.data.dataset import TransformContext
from distft.data.targets import MASKED_TOKEN
from distft.model.config import ModelConfig
from distft.objective.interface import Passes
from distft.objective.language_model import LanguageModelObjective, require_bidirectional
from distft.objective.masking import MaskingSettings

if TYPE_CHECKING:
    from distft.data.feed import Transform


class MaskedLM(MaskingSettings, LanguageModelObjective):
    """Cross entropy of the masked tokens of any rows; labels and next tokens of the data are not used."""

    type: Literal["masked_lm"] = "masked_lm"

    target_name: ClassVar[str] = MASKED_TOKEN
    has_few_targets: ClassVar[bool] = True

    @property
    def passes(self) -> Passes:
        return Passes(logits_share=self.mask_rate)

    def check_model(self, model: ModelConfig) -> None:
        require_bidirectional(model, self.type)

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        return (self.masker(context),)

    def notes(self, context: TransformContext) -> Sequence[str]:
        return self.mask_notes(context.data)
