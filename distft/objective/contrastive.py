"""Contrastive learning: embeddings of texts that belong together are near, and far from all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.data.dataset import Labels, TransformContext
from distft.data.targets import SCORE
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.model.heads import EmbeddingHead, HeadName, Heads
from distft.objective.interface import Model, ObjectiveContext, Passes, only_batch
from distft.objective.pooled import PooledObjective

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch, Batch
    from distft.data.feed import Transform
    from distft.objective.contrastive_loss import ContrastiveLoss

_TERM = "contrastive"
# Settings that have an effect with some losses and views alone are null by default, so that a needless one
# is told; a run's saved configuration has all settings.
_TEMPERATURE, _MARGIN, _CROP_SHARE = 0.05, 0.5, (0.1, 0.5)
_GRADIENT, _LOSS = "embedding_gradient", "sequence_loss"  # targets that `prepare_step` makes


class Contrastive(PooledObjective):
    """Each text is compared with its positive and with the negatives of the whole global batch.

    A step runs the model twice (GradCache, Gao et al. 2021, arXiv:2101.06983): for all embeddings of the
    global batch, whose loss gives each embedding's gradient, and to carry these gradients to the weights. So
    the loss is that of the global batch, whatever the micro-batches and the number of ranks.
    """

    type: Literal["contrastive"] = "contrastive"
    head: HeadName | None = None  # name of the head; null: embedding, in a mixture that of its part
    views: Literal["columns", "dropout", "crops"] = "columns"  # of rows with one text; several are their own
    # Least and most of a document's tokens in a crop; null: a tenth and a half, as Contriever.
    crop_share: tuple[float, float] | None = None
    loss: Literal["infonce", "triplet", "margin"] = "infonce"
    # Of infonce: divides similarities; null: 0.05. Far below 0.01 these leave float32's range.
    temperature: float | None = Field(None, ge=1e-4, allow_inf_nan=False)
    learns_temperature: bool = False  # from this temperature on; infonce only
    margin: float | None = Field(
        None, gt=0, allow_inf_nan=False
    )  # of triplet and margin, in distances; null: 0.5
    symmetric: bool = False  # the mean of both directions: text to positive, and positive to text
    negatives: Literal["batch", "own"] = "batch"  # own: a text's own hard negatives alone
    normalize: bool = True  # embeddings to length 1, so that products are cosines

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        problems = []
        if self.loss != "infonce" and (self.learns_temperature or self.temperature is not None):
            problems.append(f"loss={self.loss} compares distances, which have no temperature: leave it out")
        if self.loss == "infonce" and self.margin is not None:
            problems.append("loss=infonce has no margin: leave it out, or set loss to triplet or margin")
        if self.symmetric and self.negatives == "own":
            problems.append("symmetric needs negatives=batch: a positive has no hard negatives of its own")
        if self.crop_share is not None and not 0 < self.crop_share[0] <= self.crop_share[1] <= 1:
            problems.append(f"crop_share={list(self.crop_share)} must be two ascending numbers in (0, 1]")
        if self.crop_share is not None and self.views != "crops":
            problems.append("crop_share needs views=crops")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def heads(self, label_names: Labels) -> Heads:  # noqa: ARG002
        head = EmbeddingHead(
            pooling=self.head_pooling,
            normalize=self.normalize,
            temperature=(self.temperature or _TEMPERATURE) if self.loss == "infonce" else 1.0,
            learns_temperature=self.learns_temperature,
        )
        return {self._head: head}

    @property
    def needs_text(self) -> bool:
        return False

    def check_model(self, model: ModelConfig) -> None:
        super().check_model(model)
        if self.views == "dropout" and not model.has_dropout:
            raise ConfigError(
                "objective.views=dropout with model.dropout=0: both views of a text would be equal. Set "
                "model.dropout, such as 0.1, or another objective.views."
            )

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        """The views of each row. Raises `ConfigError` for data without them or a batch without negatives."""
        import numpy as np

        from distft.objective import views

        row = context.rows(np.zeros(1, np.int64))
        num_texts = row.views_per_sequence
        if row.images is not None and self.views == "crops":
            raise ConfigError(
                "objective.views=crops cuts texts, and these rows are images: set data.views=2 with "
                "data.augment, and leave objective.views out."
            )
        self._check_data(num_texts, context)
        if num_texts > 1:
            return (views.as_columns,)
        if self.views == "dropout":
            return (views.repeated,)
        return (views.crops(context.seed, self._crop_share),)

    def _check_data(self, num_texts: int, context: TransformContext) -> None:
        problems = []
        if num_texts == 1 and self.views == "columns":
            problems.append(
                "objective.views=columns needs two texts in each row: set data.type=pairs with the column of "
                "the second text in data.positive, or set objective.views=dropout or crops. Images have two "
                "with data.views=2, and with data.text."
            )
        if num_texts > 1 and self.views != "columns" and context.step_share is not None:
            problems.append(
                f"objective.views={self.views} makes views of rows with one text, and these have "
                f"{num_texts}, which would be the views themselves: set data.positive=null, without "
                "data.negatives, or objective.views=columns."
            )
        if self.negatives == "own" and num_texts < 3:
            problems.append(
                "objective.negatives=own needs hard negatives: name their columns in data.negatives, or set "
                "objective.negatives=batch."
            )
        elif self.negatives == "batch" and context.step_share is not None:
            problems += _problems_of_steps(context.step_share, context)
        if num_texts == 1 and self.views == "crops" and self._crop_lengths(context.data.seq_len)[1] < 2:
            problems.append(
                f"objective.crop_share={list(self._crop_share)} with batch.seq_len={context.data.seq_len}: "
                "no crop would have more than one token. Raise the larger share, or batch.seq_len."
            )
        if problems:
            raise ConfigError("\n".join(problems))

    def notes(self, context: TransformContext) -> Sequence[str]:
        """How long crops are."""
        import numpy as np

        if self.views != "crops" or context.rows(np.zeros(1, np.int64)).views_per_sequence > 1:
            return ()
        least, most = self._crop_lengths(context.data.seq_len)
        return (f"crops of a text of seq_len={context.data.seq_len:,} have {least:,} to {most:,} tokens",)

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {_TERM: 1.0}

    @property
    def passes(self) -> Passes:
        return Passes(forward_only=1.0)

    def prepare_step(
        self, model: Model, micro_batches: Sequence[AnyBatch], context: ObjectiveContext
    ) -> Sequence[AnyBatch]:
        """Adds each embedding's gradient in the loss of the global batch, and each sequence's loss."""
        import torch

        from distft.objective.contrastive_loss import losses_and_gradients

        batches = [only_batch(batch) for batch in micro_batches]
        with torch.no_grad():
            embedded = [self._vectors_and_hashes(model, batch) for batch in batches]
        losses, gradients = losses_and_gradients(
            self._loss,
            torch.cat([vectors for vectors, _ in embedded]),
            torch.cat([hashes for _, hashes in embedded]),
            context.collectives,
        )
        sizes = [len(hashes) for _, hashes in embedded]
        parts = zip(batches, torch.split(losses, sizes), torch.split(gradients, sizes), strict=True)
        return [
            replace(batch, targets={**batch.targets, _LOSS: own_losses, _GRADIENT: own_gradients})
            for batch, own_losses, own_gradients in parts
        ]

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        return only_batch(batch).num_targets

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        """The losses that `prepare_step` found, with its gradients."""
        own = only_batch(batch)
        gradients = own.targets[_GRADIENT]
        # Also of a batch without targets: every rank runs a backward.
        vectors = self._vectors(model, own)
        product = (vectors[: len(gradients)] * gradients).sum() + vectors.sum() * 0
        return {_TERM: product + (own.targets[_LOSS].sum() - product).detach()}

    @property
    def per_row(self) -> frozenset[str]:
        return frozenset({"embedding", "text_hash", "score"})

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:  # noqa: ARG002
        """The embeddings [n, K, C] of n sequences, the hashes [n, K] of their texts, and the scores [n]."""
        import torch

        own = only_batch(batch)
        with torch.no_grad():
            vectors, hashes = self._vectors_and_hashes(model, own)
        outputs = {"embedding": vectors, "text_hash": hashes}
        if SCORE in own.targets:
            outputs["score"] = own.targets[SCORE][:: own.rows_per_sequence][: len(vectors)]
        return outputs

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The loss among all that were evaluated; the rank correlation of scores, or else the ranks found."""
        from torch.nn.functional import cosine_similarity

        from distft.objective.contrastive_loss import losses_of_all
        from distft.objective.retrieval import retrieval_metrics, spearman

        vectors, hashes = sums["embedding"].double(), sums["text_hash"]
        metrics = {"loss": float(losses_of_all(self._loss, vectors, hashes).sum() / max(len(vectors), 1))}
        if "score" in sums:
            cosines = cosine_similarity(vectors[:, 0], vectors[:, 1], dim=-1)
            return {**metrics, "spearman": spearman(cosines, sums["score"])}
        is_copies = self.views == "dropout" and bool((hashes[:, 0] == hashes[:, 1]).all())
        if is_copies:
            return metrics
        metrics |= retrieval_metrics(vectors, hashes)
        if self.symmetric:
            # The positives look for the texts. Many texts may belong to one, so that its recall at 1 is low.
            found = retrieval_metrics(vectors[:, :2].flip(1), hashes[:, :2].flip(1))
            metrics |= {f"reverse_{name}": value for name, value in found.items()}
        return metrics

    def _vectors_and_hashes(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings [n, K, C] and text hashes [n, K] of the n sequences that are targets: all, or none."""
        from distft.objective.views import TEXT_HASH

        num_sequences = batch.num_targets[_TERM]
        hashes = batch.targets[TEXT_HASH].view(-1, batch.views_per_sequence)
        return self._vectors(model, batch)[:num_sequences], hashes[:num_sequences]

    def _vectors(self, model: Model, batch: Batch) -> Tensor:
        """The embeddings [n, K, C] of every sequence."""
        vectors = model(**batch.model_inputs, heads=(self._head,))[self._head]
        return vectors.view(-1, batch.views_per_sequence, vectors.shape[1])

    @property
    def _loss(self) -> ContrastiveLoss:
        from distft.objective.contrastive_loss import ContrastiveLoss

        return ContrastiveLoss(
            kind=self.loss,
            margin=self.margin or _MARGIN,
            is_symmetric=self.symmetric,
            own_negatives=self.negatives == "own",
        )

    @property
    def _crop_share(self) -> tuple[float, float]:
        return self.crop_share or _CROP_SHARE

    def _crop_lengths(self, num_tokens: int) -> list[int]:
        """The least and most tokens of a crop of a text of `num_tokens`."""
        from distft.objective.views import crop_length

        return [crop_length(num_tokens, share) for share in self._crop_share]

    @property
    def _head(self) -> str:
        return self.head or "embedding"


def _problems_of_steps(step_share: float, context: TransformContext) -> Iterator[str]:
    """Why a text has no negatives in a training step, if so."""
    global_batch_size = context.data.global_batch_size
    if global_batch_size < 2:
        yield (
            "batch.global_batch_size=1 leaves a text without negatives: they are the other texts of the "
            "global batch. Raise it to 2 or more; 64 to 4096 is usual."
        )
    elif global_batch_size * step_share < 2:
        yield (
            f"Of the batch.global_batch_size={global_batch_size} sequences of a step, this stream has "
            f"{global_batch_size * step_share:.3g} on average, and a text's negatives are the others of "
            "them. Raise batch.global_batch_size or the stream's share, so that it has 2 or more, or set "
            "data.alternate=true."
        )
    elif context.num_sequences < 2:
        yield "The data has one row alone, so that a text has no negatives: add others."
