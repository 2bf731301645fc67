"""Next-token prediction; the labels decide which tokens count: whole documents or completions only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.config import Settings
from distft.data.dataset import Labels, TransformContext
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.model.heads import Heads
from distft.objective.language_model import (
    LanguageModelObjective,
    first_row,
    require_causal,
    require_no_labels,
)

if TYPE_CHECKING:  # a configuration is checked without NumPy
    from distft.data.batch import Batch
    from distft.data.feed import Transform
    from distft.data.fill_in_the_middle import MiddleMover


class FillInTheMiddle(Settings):
    """Trains to fill gaps: some documents have their middle moved to the end (arXiv:2207.14255)."""

    rate: float = Field(0.5, gt=0, le=1)  # share of documents
    spm_rate: float = Field(0.5, ge=0, le=1)  # share of those in which the suffix comes first
    prefix: str = "<fim_prefix>"  # pieces of the tokenizer
    suffix: str = "<fim_suffix>"
    middle: str = "<fim_middle>"

    @model_validator(mode="after")
    def _check_tokens(self) -> Self:
        if len({self.prefix, self.suffix, self.middle}) < 3:
            raise ValueError("prefix, suffix and middle must differ from one another")
        return self

    def mover(self, context: TransformContext, row: Batch) -> MiddleMover:
        """The transform of batches like `row`. Raises `ConfigError` if tokenizer or data do not fit."""
        from distft.data.fill_in_the_middle import MiddleMover

        data = context.data
        pieces = (self.prefix, self.suffix, self.middle)
        ids = {piece: data.piece_id(piece) for piece in pieces}
        if missing := [piece for piece, piece_id in ids.items() if piece_id is None]:
            symbols = " ".join(f"--symbol '{piece}'" for piece in pieces)
            raise ConfigError(
                f"objective.fim: the tokenizer has no piece {', '.join(missing)}: train one with `distft "
                f"tokenizer train {symbols}`, or name its own as prefix, suffix and middle."
            )
        if row.lengths is not None:
            raise ConfigError(
                "objective.fim moves parts of whole documents, and these rows are prompts with completions: "
                "leave it out, or set data.type=tokens."
            )
        prefix, suffix, middle = (i for i in ids.values() if i is not None)
        return MiddleMover(
            seed=context.seed,
            rate=self.rate,
            spm_rate=self.spm_rate,
            marks=(prefix, suffix, middle),
            bos_id=data.bos_id,
            eos_id=data.eos_id,
            token_bytes=data.token_bytes,
        )


class CausalLM(LanguageModelObjective):
    """Cross entropy of every target token: labels other than `ignore_index`."""

    type: Literal["causal_lm"] = "causal_lm"
    fim: FillInTheMiddle | None = None

    def heads(self, label_names: Labels) -> Heads:
        """`lm_head`. Raises `ConfigError` for labelled data."""
        require_no_labels(label_names, self.type)
        return super().heads(label_names)

    def check_model(self, model: ModelConfig) -> None:
        require_causal(model, self.type)

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        row = first_row(context, self.type)
        return () if self.fim is None else (self.fim.mover(context, row),)
