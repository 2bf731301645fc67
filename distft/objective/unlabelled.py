"""What objectives for unlabelled rows have in common: they train the classifier of another part of a mixture.

Shape letters: B rows of one view, K classes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field

from distft.config import Settings
from distft.data.dataset import DataContext, Labels, TransformContext
from distft.data.targets import IGNORE_INDEX, ROW
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.model.heads import HeadName, Heads
from distft.objective.interface import Model, Objective, ObjectiveContext, Passes, only_batch
from distft.objective.row_objective import require_targets

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch, Batch
    from distft.data.feed import Feed, Transform
    from distft.data.token_dropout import TokenDropout

# Name of the targets [B, K]: probabilities, or IGNORE_INDEX in a row that is left out.
SOFT_LABEL = "soft_label"
ConsistencyLoss = Literal["mse", "kl"]


class View(Settings):
    """How a view of a text differs from the text. With rate 0, model.dropout alone tells views apart."""

    rate: float = Field(0.0, ge=0, lt=1)  # share of tokens or words that are hit
    unit: Literal["token", "word"] = "token"  # words as the tokenizer cuts them
    action: Literal["drop", "replace", "unknown"] = "drop"  # unknown: the tokenizer's piece for unknown text

    def dropout(self, data: DataContext, setting: str) -> TokenDropout:
        """Raises `ConfigError` if the tokenizer lacks what it needs."""
        import numpy as np

        from distft.data.masking import special_ids
        from distft.data.token_dropout import TokenDropout

        is_special = special_ids(data)
        replacements = None
        if self.action == "replace":
            replacements = np.flatnonzero(~is_special)
        elif self.action == "unknown":
            if data.unk_id is None:
                raise ConfigError(
                    f"{setting}.action=unknown: the tokenizer has no unknown piece. Set action=drop."
                )
            replacements = np.array([data.unk_id], np.int64)
        if self.unit == "word" and (data.starts_word is None or not data.starts_word.any()):
            raise ConfigError(
                f"{setting}.unit=word: no piece of this tokenizer begins with a space, so where words begin "
                "is unknown. Set unit=token."
            )
        return TokenDropout(
            rate=self.rate,
            is_special=is_special,
            starts_word=data.starts_word if self.unit == "word" else None,
            replacements=replacements,
        )


class UnlabelledObjective(Objective):
    """An objective of one part of a mixture, on rows without labels.

    Its targets are rows; those that are left out for low confidence count in the divisor too, as in FixMatch
    (Sohn et al. 2020, arXiv:2001.07685).
    """

    head: HeadName  # the classifier of another part, by its name

    @property
    def views(self) -> Mapping[str, View]:
        """The views of each text, by setting; empty: the text itself."""
        return {}

    def heads(self, label_names: Labels) -> Heads:  # noqa: ARG002
        return {}

    def require_head(self, classifiers: Collection[str], others: Collection[str]) -> None:
        """Raise `ConfigError` unless `head` is in `classifiers`: one label a row, unlike `others`."""
        if self.head in classifiers:
            return
        known = f"these have one: {', '.join(classifiers)}" if classifiers else "no part has one"
        what = "is not a classifier with one label a row" if self.head in others else "is not there"
        raise ConfigError(
            f"head={self.head!r} {what}. It must be that of a part with type=classification, and {known}."
        )

    def with_labelled(self, feeds: Sequence[Feed]) -> Self:  # noqa: ARG002
        """As `resolved`, for settings whose default depends on the rows whose labels train the head."""
        return self

    def require_classes(self, num_classes: int | None) -> None:
        """Raise `ConfigError` if the settings do not fit the head's number of classes; None: unknown."""

    def check_model(self, model: ModelConfig) -> None:
        """Any model that the classifier accepts."""

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        from distft.data.token_dropout import TextViews

        name = self.type  # type: ignore[attr-defined]
        remedy = "it takes unlabelled rows, data.type=labelled with label=null"
        require_targets(context, ROW, f"objective.type={name}", remedy)
        dropouts = [view.dropout(context.data, setting) for setting, view in self.views.items()]
        return [TextViews(dropouts=dropouts, seed=context.seed)] if dropouts else []

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {ROW: 1.0}

    @property
    def passes(self) -> Passes:
        """One view is predicted, and the other learns."""
        return Passes(trained=0.5, forward_only=0.5) if self.views else Passes()

    @property
    def confident_target(self) -> str | None:
        """The targets of `prepare_step` that rows lack for low confidence; None: it leaves out no row."""
        return None

    @property
    def training_sum_names(self) -> Sequence[str]:
        return () if self.confident_target is None else ("num_confident", "num_rows")

    def training_sums(self, batch: AnyBatch) -> Mapping[str, Tensor]:
        if self.confident_target is None:
            return {}
        batch = only_batch(batch)
        targets = batch.targets[self.confident_target]
        is_confident = (targets if targets.ndim == 1 else targets[:, 0]) != IGNORE_INDEX
        return {"num_confident": is_confident.sum(), "num_rows": counts(batch).sum()}

    def training_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The share of rows that are learnt from, if confidence decides which."""
        num_rows = sums.get("num_rows", 0)
        return {"confident_share": sums["num_confident"] / num_rows} if num_rows else {}

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        return {ROW: only_batch(batch).num_targets[ROW]}

    def logits(self, model: Model, batch: Batch, view: int) -> Tensor:
        """fp32 [B, K]: the classifier's, for one view of each sequence."""
        from distft.data.token_dropout import rows_of_view

        return model(**rows_of_view(batch, view).model_inputs, heads=(self.head,))[self.head].float()

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Sums over the rows' first views: entropy of the prediction, largest probability, and 1."""
        import torch

        batch = only_batch(batch)
        with torch.no_grad():
            log_p = self.logits(model, batch, 0).double().log_softmax(dim=1)[counts(batch)]
        return {
            "entropy": -(log_p.exp() * log_p).sum(),
            "confidence": log_p.amax(dim=1).exp().sum(),
            "num_rows": torch.tensor(len(log_p), device=log_p.device),
        }

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Of predictions without labels: their mean entropy, also as the loss, and mean confidence."""
        num_rows = sums["num_rows"].clamp_min(1)
        entropy = float(sums["entropy"] / num_rows)
        return {"loss": entropy, "entropy": entropy, "confidence": float(sums["confidence"] / num_rows)}


def counts(batch: Batch) -> Tensor:
    """bool [B]: which sequences of the batch are there to learn from."""
    return batch.targets[ROW][:: batch.rows_per_sequence] != IGNORE_INDEX


def consistency_sum(kind: ConsistencyLoss, soft_labels_BK: Tensor, logits_BK: Tensor) -> Tensor:
    """How far predictions are from `soft_labels_BK`, summed over the rows that have some.

    The squared error is a mean over classes, as in the code of Tarvainen & Valpola (2017, arXiv:1703.01780);
    the divergence is KL(soft label || prediction).
    """
    from torch.nn.functional import kl_div

    soft_BK = soft_labels_BK.clamp_min(0)
    if kind == "mse":
        losses_B = (logits_BK.softmax(dim=1) - soft_BK).square().mean(dim=1)
    else:
        losses_B = kl_div(logits_BK.log_softmax(dim=1), soft_BK, reduction="none").sum(dim=1)
    return losses_B.where(soft_labels_BK[:, 0] != IGNORE_INDEX, 0.0).sum()
