"""Next sentence and sentence order: whether two texts follow each other; alone, or joined with masking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from distft.data.dataset import DataContext, Labels, TransformContext
from distft.data.targets import IGNORE_INDEX, MASKED_TOKEN
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, HeadName, Heads
from distft.objective.interface import Model, ObjectiveContext, Passes, only_batch
from distft.objective.language_model import (
    hidden_losses,
    require_bidirectional,
    token_metrics,
    with_counts,
)
from distft.objective.masking import MaskingSettings
from distft.objective.pooled import PooledObjective

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch, Batch
    from distft.data.feed import Transform
    from distft.objective.cross_entropy import FusedLinearCrossEntropy, LossAndNumCorrect

_FIRST_PIECES = ("<cls>", "[CLS]")
_SEPARATOR_PIECES = ("<sep>", "[SEP]")


class SentencePairs(PooledObjective):
    """Cross entropy of a pair's label: 0 for two neighbouring texts as they were, 1 for a changed pair.

    With `masking` the pair's tokens are masked too, and the sum of the two mean losses is minimized, as BERT
    does. The pairs are made of any rows; labels and next tokens of the data are not used.
    """

    head: HeadName | None = None  # name of its parameters; null: the objective's type
    masking: MaskingSettings | None = None  # settings as of masked_lm; null: no tokens are masked

    name: ClassVar[str]  # of the objective, its targets and its term
    draws_other_rows: ClassVar[bool]

    def heads(self, label_names: Labels) -> Heads:  # noqa: ARG002
        pair = {self._head: ClassificationHead(num_labels=2, pooling=self.head_pooling)}
        return pair if self.masking is None else {**LANGUAGE_MODEL, **pair}

    def check_model(self, model: ModelConfig) -> None:
        if self.masking is not None:
            require_bidirectional(model, f"{self.name} and masking")
        super().check_model(model)

    @property
    def passes(self) -> Passes:
        return Passes() if self.masking is None else Passes(logits_share=self.masking.mask_rate)

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        import numpy as np

        from distft.data.masking import special_ids
        from distft.data.sentence_pairs import PairMaker

        data = context.data
        pair_maker = PairMaker(
            target=self.name,
            seed=context.seed,
            seq_len=data.seq_len,
            first_id=_piece(data, _FIRST_PIECES, data.bos_id),
            separator_id=_separator_id(data),
            pad_id=data.pad_id or 0,
            has_segments=data.has_segments,
            is_special=special_ids(data, *_FIRST_PIECES, *_SEPARATOR_PIECES),
            starts_word=data.starts_word,
            num_sequences=context.num_sequences,
            rows=context.rows if self.draws_other_rows else None,
        )
        if data.seq_len < pair_maker.num_marks + 2:
            raise ConfigError(
                f"batch.seq_len={data.seq_len} leaves no room for two texts and {pair_maker.num_marks} marks."
            )
        if self.draws_other_rows and context.num_sequences < 2:
            raise ConfigError(
                f"objective.type={self.name} takes texts of other rows, and the data has one row only: add "
                "text, or lower batch.seq_len."
            )
        rows = context.rows(np.arange(min(context.num_sequences, 16), dtype=np.int64))
        if rows.rows_per_sequence > 1:
            raise ConfigError(
                f"objective.type={self.name} makes pairs of documents, and these rows are pairs already: set "
                "data.type=tokens."
            )
        if max(map(len, pair_maker.texts(rows))) < 2:
            raise ConfigError(
                f"objective.type={self.name}: no document in the first rows has two tokens, to be cut in two."
            )
        if self.masking is None:
            return (pair_maker,)
        masker = self.masking.masker(
            context, setting="objective.masking", pieces=(*_FIRST_PIECES, *_SEPARATOR_PIECES)
        )

        def masked_pairs(batch: Batch) -> Batch:
            pairs = pair_maker(batch)
            masked = masker(pairs)
            return replace(
                masked,
                targets={**pairs.targets, **masked.targets},
                num_targets={**pairs.num_targets, **masked.num_targets},
            )

        return (masked_pairs,)

    def notes(self, context: TransformContext) -> Sequence[str]:
        return () if self.masking is None else self.masking.mask_notes(context.data)

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {self.name: 1.0} if self.masking is None else {self.name: 1.0, MASKED_TOKEN: 1.0}

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        return only_batch(batch).num_targets

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:
        from torch.nn.functional import cross_entropy

        from distft.objective.cross_entropy import FusedLinearCrossEntropy

        rows = only_batch(batch)
        loss_fn = FusedLinearCrossEntropy(context.vocab_size, compiles=context.compiles)
        outputs = self._forward(model, rows, loss_fn)
        sums = {
            self.name: cross_entropy(
                outputs[self._head].float(),
                rows.targets[self.name],
                ignore_index=IGNORE_INDEX,
                reduction="sum",
            )
        }
        return sums if self.masking is None else {**sums, MASKED_TOKEN: outputs["lm_head"]}

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:
        """`pairs`, float64 [3]: loss, correct predictions and number of pairs; `tokens` as of `masked_lm`."""
        import torch
        from torch.nn.functional import cross_entropy

        from distft.objective.cross_entropy import LossAndNumCorrect

        rows = only_batch(batch)
        with torch.no_grad():
            outputs = self._forward(model, rows, LossAndNumCorrect(context.vocab_size))
        labels = rows.targets[self.name]
        logits = outputs[self._head].double()
        loss = cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        num_correct = (logits.argmax(dim=1) == labels).sum().double()
        num_pairs = (labels != IGNORE_INDEX).sum().double()
        sums = {"pairs": torch.stack([loss, num_correct, num_pairs])}
        if self.masking is not None:
            sums["tokens"] = with_counts(outputs["lm_head"], rows, MASKED_TOKEN)
        return sums

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss and accuracy; joined with masking each by its term's name, and `loss`, their sum."""
        loss_sum, num_correct, num_pairs = sums["pairs"].tolist()
        of_pairs = {"loss": loss_sum / max(num_pairs, 1), "accuracy": num_correct / max(num_pairs, 1)}
        if self.masking is None:
            return of_pairs
        of_tokens = token_metrics(sums["tokens"])
        return {
            "loss": of_pairs["loss"] + of_tokens["loss"],
            **{f"{self.name}/{key}": value for key, value in of_pairs.items()},
            **{f"{MASKED_TOKEN}/{key}": value for key, value in of_tokens.items()},
        }

    def report(self, sums: Mapping[str, Tensor], label_names: Labels) -> Sequence[str]:  # noqa: ARG002
        from distft.objective.intervals import share_line

        _, num_correct, num_pairs = sums["pairs"].tolist()
        return [share_line(num_correct, num_pairs, "pairs", "accuracy")]

    def _forward(
        self, model: Model, rows: Batch, loss_fn: FusedLinearCrossEntropy | LossAndNumCorrect
    ) -> Mapping[str, Tensor]:
        if self.masking is None:
            return model(**rows.model_inputs, heads=(self._head,))
        losses = hidden_losses(rows, loss_fn, MASKED_TOKEN, has_few_targets=True)
        return model(**rows.model_inputs, heads=("lm_head", self._head), losses_from_hidden=losses)

    @property
    def _head(self) -> str:
        return self.head or self.name


class NextSentence(SentencePairs):
    """Whether a text follows another in its document, or is of another row (BERT, arXiv:1810.04805)."""

    type: Literal["next_sentence"] = "next_sentence"

    name: ClassVar[str] = "next_sentence"
    draws_other_rows: ClassVar[bool] = True


class SentenceOrder(SentencePairs):
    """Whether two neighbouring texts are in their order, or exchanged (ALBERT, arXiv:1909.11942)."""

    type: Literal["sentence_order"] = "sentence_order"

    name: ClassVar[str] = "sentence_order"
    draws_other_rows: ClassVar[bool] = False


def _piece(context: DataContext, names: Sequence[str], otherwise: int | None) -> int | None:
    ids = [context.piece_id(name) for name in names]
    return next((i for i in ids if i is not None), otherwise)


def _separator_id(context: DataContext) -> int:
    separator_id = _piece(context, _SEPARATOR_PIECES, context.eos_id)
    if separator_id is None:
        raise ConfigError(
            f"The tokenizer has neither a separator ({' or '.join(_SEPARATOR_PIECES)}) nor an eos to stand "
            "between two texts: train one with `distft tokenizer train --symbol '<sep>'`."
        )
    return separator_id
