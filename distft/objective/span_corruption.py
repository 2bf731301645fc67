"""Span corruption, as a task of a decoder: the corrupted text, and behind it the spans that it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, takewhile
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distft.data.dataset import DataContext, TransformContext
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.objective.interface import Passes
from distft.objective.language_model import LanguageModelObjective, require_targets_behind_prefix
from distft.objective.masking import mask_token_id

if TYPE_CHECKING:
    from distft.data.feed import Transform
    from distft.data.span_corruption import SpanCorrupter

_SENTINEL = "<extra_id_{}>"  # T5's name


class SpanCorruption(LanguageModelObjective):
    """Cross entropy of removed spans behind the corrupted text (Raffel et al. 2019, arXiv:1910.10683, 3.1.4).

    Both are one row, and the text a prefix of it: T5 gives that to an encoder and the spans to a decoder, and
    in a causal model its tokens attend to each other. Labels and next tokens of the data are not used.
    """

    type: Literal["span_corruption"] = "span_corruption"
    noise_density: float = Field(0.15, gt=0, lt=1)  # share of a document's tokens that is removed
    mean_span_length: float = Field(3.0, ge=1, le=1000)  # in tokens

    has_few_targets: ClassVar[bool] = True

    @property
    def passes(self) -> Passes:
        spans = self.noise_density / self.mean_span_length  # a token of the text; each has two sentinels
        return Passes(logits_share=(self.noise_density + spans) / (1 + 2 * spans))

    def check_model(self, model: ModelConfig) -> None:
        require_targets_behind_prefix(model, self.type)

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        import numpy as np

        from distft.data.documents import documents

        data = context.data
        sentinels, corrupter = _sentinel_ids(data), self._corrupter(context)
        num_spans = _most_spans(corrupter, data.seq_len)
        if not num_spans:
            raise ConfigError(
                f"batch.seq_len={data.seq_len} leaves no target: a text and one span do not fit. Raise it."
            )
        if sentinels and num_spans > len(sentinels):
            raise ConfigError(
                f"objective.noise_density={self.noise_density:g} and mean_span_length="
                f"{self.mean_span_length:g} make {num_spans} spans of a row of {data.seq_len} tokens, but "
                f"the tokenizer's sentinels end at {_SENTINEL.format(len(sentinels) - 1)}: make the spans "
                "longer or fewer, or lower batch.seq_len."
            )
        rows = context.rows(np.arange(min(context.num_sequences, 16), dtype=np.int64))
        lengths = [stop - start for _, start, stop in documents(rows)]
        if not any(corrupter.source_length(length, length) for length in lengths):
            raise ConfigError("objective.type=span_corruption: these texts are too short for a span.")
        return (corrupter,)

    def notes(self, context: TransformContext) -> Sequence[str]:
        if _sentinel_ids(context.data):
            return ()
        first = _SENTINEL.format(0)
        num_spans = _most_spans(self._corrupter(context), context.data.seq_len)
        others = f" and so on to `--symbol '{_SENTINEL.format(num_spans - 1)}'`" if num_spans > 1 else ""
        return (
            f"all removed spans have one sentinel, id {mask_token_id(context.data)}, in order: the tokenizer "
            f"has no {first}. `distft tokenizer train --symbol '{first}'`{others} makes one that has them.",
        )

    def _corrupter(self, context: TransformContext) -> SpanCorrupter:
        from distft.data.span_corruption import SpanCorrupter

        return SpanCorrupter(
            seed=context.seed,
            noise_density=self.noise_density,
            mean_span_length=self.mean_span_length,
            sentinel_ids=_sentinel_ids(context.data) or (mask_token_id(context.data),),
            eos_id=context.data.eos_id,
            pad_id=context.data.pad_id or 0,
        )


def _most_spans(corrupter: SpanCorrupter, seq_len: int) -> int:
    """That a row of one document has; 0: none fits."""
    longest = corrupter.source_length(seq_len, seq_len)
    return corrupter.num_noise_and_spans(longest)[1] if longest else 0


def _sentinel_ids(context: DataContext) -> tuple[int, ...]:
    """Those that the tokenizer has, from <extra_id_0> on without a gap."""
    ids = (context.piece_id(_SENTINEL.format(number)) for number in count())
    return tuple(takewhile(lambda piece_id: piece_id is not None, ids))  # type: ignore[arg-type]
