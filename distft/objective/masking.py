"""Settings of masking: which tokens are hidden from the model, and what stands in their places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.config import Settings
from distft.data.dataset import DataContext, TransformContext
from distft.errors import ConfigError

if TYPE_CHECKING:  # a configuration is checked without NumPy
    from distft.data.masking import Masker

_MASK_PIECES = ("<mask>", "[MASK]")
_MEAN_SPAN_LENGTH = 3.0
_MOST_ROWS = 16  # that are read to estimate how many targets a step has


class MaskingSettings(Settings):
    """BERT's masking (Devlin et al. 2018, arXiv:1810.04805), of tokens, whole words or spans."""

    mask_rate: float = Field(0.15, gt=0, le=1)  # share of a row's tokens that are targets
    masked: Literal["tokens", "words", "spans"] = "tokens"  # what is drawn as a whole
    mean_span_length: float = Field(_MEAN_SPAN_LENGTH, ge=1, le=1000)  # in tokens, geometrically distributed
    mask_token_share: float = Field(0.8, ge=0, le=1)  # of the targets: replaced by the mask token
    random_token_share: float = Field(0.1, ge=0, le=1)  # replaced by any token; the rest are kept

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        total = self.mask_token_share + self.random_token_share
        if total > 1 + 1e-9:
            raise ValueError(
                f"mask_token_share={self.mask_token_share} and random_token_share={self.random_token_share} "
                f"add up to {total:g}: at most 1 can be replaced, and the rest are kept."
            )
        if total == 0:
            raise ValueError(
                "mask_token_share and random_token_share are both 0: every target would be in its place, for "
                "the model to copy. Give one of them a share, such as 0.8."
            )
        # Not by what was given: the file of a run gives every setting.
        if self.mean_span_length != _MEAN_SPAN_LENGTH and self.masked != "spans":
            raise ValueError(
                f"mean_span_length={self.mean_span_length:g} has no effect with masked: {self.masked}: set "
                "masked: spans, or leave it out."
            )
        return self

    def masker(
        self, context: TransformContext, *, setting: str = "objective", pieces: Sequence[str] = ()
    ) -> Masker:
        """What masks batches, but for `pieces`. Raises `ConfigError` if tokenizer or data do not fit."""
        import numpy as np

        from distft.data.masking import Masker, special_ids

        data = context.data
        mask_id = mask_token_id(data) if self.mask_token_share else None
        is_special = special_ids(data, *_MASK_PIECES, *pieces)
        starts_word = data.starts_word
        if self.masked == "words":
            starts_text = starts_word is not None and bool(
                (starts_word & ~is_special[: len(starts_word)]).any()
            )
            if not starts_text:
                raise ConfigError(
                    f"{setting}.masked=words: no piece of this tokenizer begins with a space, so where words "
                    f"begin is unknown. Set {setting}.masked=spans or tokens, or train another tokenizer."
                )
        masker = Masker(
            seed=context.seed,
            mask_id=mask_id,
            is_special=is_special,
            starts_word=starts_word if self.masked == "words" else None,
            mask_rate=self.mask_rate,
            mean_span_length=self.mean_span_length if self.masked == "spans" else None,
            mask_token_share=self.mask_token_share,
            random_token_share=self.random_token_share,
        )
        numbers = np.arange(min(context.num_sequences, data.global_batch_size, _MOST_ROWS), dtype=np.int64)
        num_tokens = masker.num_maskable(context.rows(numbers)) * data.global_batch_size / len(numbers)
        if num_tokens * self.mask_rate < 1:
            raise ConfigError(
                f"{setting}.mask_rate={self.mask_rate:g} leaves no target: a step of "
                f"{data.global_batch_size:,} rows has about {num_tokens:,.0f} tokens that can be masked, of "
                f"which {num_tokens * self.mask_rate:.2g} would be. Raise it, or batch.seq_len or "
                "batch.global_batch_size."
            )
        return masker

    def mask_notes(self, context: DataContext) -> tuple[str, ...]:
        """A line if the unknown token serves as the mask."""
        if not self.mask_token_share or _mask_piece_id(context) is not None:
            return ()
        return (
            f"masked tokens become the unknown token, id {context.unk_id}: the tokenizer has no "
            f"{' or '.join(_MASK_PIECES)} (a tokenizer with byte fallback encodes no text to it). "
            f"`distft tokenizer train --symbol '{_MASK_PIECES[0]}'` makes one that has it.",
        )


def mask_token_id(context: DataContext) -> int:
    """The id that stands for a masked token. Raises `ConfigError` for a tokenizer without any."""
    piece_id = _mask_piece_id(context)
    if piece_id is not None:
        return piece_id
    if context.unk_id is not None:
        return context.unk_id
    raise ConfigError(
        f"The tokenizer has neither a mask token ({' or '.join(_MASK_PIECES)}) nor an unknown one: train one "
        "with `distft tokenizer train --symbol '<mask>'`."
    )


def _mask_piece_id(context: DataContext) -> int | None:
    ids = [context.piece_id(piece) for piece in _MASK_PIECES]
    return next((i for i in ids if i is not None), None)
