"""Pseudo-labels: confident predictions on one view of a text are labels for another view.

Shape letters: B rows of one view, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.config.step_function import StepFunction, value_at, values_of
from distft.data.targets import IGNORE_INDEX, ROW
from distft.errors import ConfigError
from distft.model.heads import ClassificationHead, Heads
from distft.objective.interface import Model, ObjectiveContext, only_batch
from distft.objective.unlabelled import UnlabelledObjective, View, counts

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch
    from distft.data.dataset import TransformContext
    from distft.data.feed import Feed

PSEUDO_LABEL = "pseudo_label"  # name of the targets [B]: the predicted class, if it is confident
_MOST_SHOWN = 20  # class shares in the log
_LEAST_MEAN = 1e-6  # of a class's predictions, by which others are divided
_MEAN, _CONFIDENT = "mean_prediction", "confident_share"  # [K] each, in the objective's state


class PseudoLabel(UnlabelledObjective):
    """FixMatch (Sohn et al. 2020, arXiv:2001.07685), FlexMatch's thresholds, ReMixMatch's alignment."""

    type: Literal["pseudo_label"] = "pseudo_label"
    threshold: StepFunction = 0.95  # least confidence; points [[step, confidence], ...] to anneal it
    per_class: bool = False  # lower it for classes that are seldom confident (arXiv:2110.08263)
    align: bool = False  # pull the mean prediction to `class_shares` (arXiv:1911.09785)
    # In the head's order of classes; labelled: as among the rows whose labels train the head.
    class_shares: tuple[float, ...] | Literal["labelled"] | None = "labelled"  # null: all classes alike
    momentum: float = Field(0.99, ge=0, lt=1)  # of the running means for per_class and align, a step
    weak: View = View()  # the view that is labelled
    strong: View = View(rate=0.2)  # the view that learns

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(not 0 <= value <= 1 for value in values_of(self.threshold)):
            raise ValueError("threshold must be from 0 to 1")
        if isinstance(self.class_shares, tuple) and min(self.class_shares, default=0) <= 0:
            raise ValueError("class_shares must be above 0")
        if isinstance(self.class_shares, tuple) and not self.align:
            raise ValueError("class_shares have an effect with align: true only")
        return self

    @property
    def views(self) -> Mapping[str, View]:
        return {"weak": self.weak, "strong": self.strong}

    @property
    def confident_target(self) -> str | None:
        return PSEUDO_LABEL

    def with_labelled(self, feeds: Sequence[Feed]) -> Self:
        known = [feed for feed in feeds if feed.label_names is not None]
        if self.class_shares != "labelled" or (self.align and not known):
            return self
        return self.model_copy(update={"class_shares": _shares(known) if self.align else None})

    def notes(self, context: TransformContext) -> Sequence[str]:  # noqa: ARG002
        if not isinstance(self.class_shares, tuple):
            return ()
        shown = ", ".join(f"{share:.3g}" for share in self.class_shares[:_MOST_SHOWN])
        more = ", ..." if len(self.class_shares) > _MOST_SHOWN else ""
        return (f"predictions are aligned with the class shares {shown}{more}",)

    def require_classes(self, num_classes: int | None) -> None:
        given = len(self.class_shares) if isinstance(self.class_shares, tuple) else 0
        if given and num_classes is not None and given != num_classes:
            raise ConfigError(
                f"class_shares has {given} numbers, but head {self.head!r} has {num_classes} classes."
            )

    def initial_state(self, heads: Heads) -> Mapping[str, Sequence[float]]:
        head = heads[self.head]
        assert isinstance(head, ClassificationHead)
        num_classes = head.num_labels
        state = {_MEAN: [1 / num_classes] * num_classes} if self.align else {}
        return state | ({_CONFIDENT: [0.0] * num_classes} if self.per_class else {})

    def prepare_step(
        self, model: Model, micro_batches: Sequence[AnyBatch], context: ObjectiveContext
    ) -> Sequence[AnyBatch]:
        """Adds the targets, which depend on running means over the whole global batch."""
        import torch

        batches = [only_batch(batch) for batch in micro_batches]
        with torch.no_grad():
            p_BK = torch.cat([self.logits(model, batch, 0) for batch in batches]).softmax(dim=1)
            real_B = torch.cat([counts(batch) for batch in batches])
            if self.align:
                p_BK = self._aligned(p_BK, real_B, context)
            labels_B = self._labels(p_BK, real_B, context)
        sizes = [len(counts(batch)) for batch in batches]
        return [
            replace(batch, targets={**batch.targets, PSEUDO_LABEL: labels})
            for batch, labels in zip(batches, torch.split(labels_B, sizes), strict=True)
        ]

    def _aligned(self, p_BK: Tensor, real_B: Tensor, context: ObjectiveContext) -> Tensor:
        mean_K = context.state[_MEAN]
        self._update_mean(mean_K, p_BK * real_B[:, None], real_B, context)
        assert self.class_shares != "labelled"  # `with_labelled` has counted
        shares_K = p_BK.new_tensor(self.class_shares or [1.0] * p_BK.shape[1])
        aligned_BK = p_BK * (shares_K / mean_K.clamp_min(_LEAST_MEAN))
        return aligned_BK / aligned_BK.sum(dim=1, keepdim=True)

    def _labels(self, p_BK: Tensor, real_B: Tensor, context: ObjectiveContext) -> Tensor:
        from torch.nn.functional import one_hot

        confidence_B, class_B = p_BK.max(dim=1)
        threshold = value_at(self.threshold, context.step)
        threshold_B = confidence_B.new_full(confidence_B.shape, threshold)
        if self.per_class:
            share_K = context.state[_CONFIDENT]
            threshold_B = threshold * class_factors(share_K)[class_B]
            is_sure_B = real_B & (confidence_B >= threshold)
            hits_BK = one_hot(class_B, p_BK.shape[1]) * is_sure_B[:, None]
            self._update_mean(share_K, hits_BK.float(), real_B, context)
        return class_B.where(real_B & (confidence_B >= threshold_B), IGNORE_INDEX)

    def _update_mean(
        self, mean_K: Tensor, values_BK: Tensor, real_B: Tensor, context: ObjectiveContext
    ) -> None:
        """Move `mean_K` in place towards the mean of `values_BK` over the real rows of all ranks."""
        import torch

        sums = torch.cat([values_BK.sum(dim=0), real_B.sum()[None]])
        sums = context.collectives.all_reduce_sum(sums)
        share = (1 - self.momentum) * (sums[-1] > 0)  # a step without unlabelled rows changes nothing
        mean_K.lerp_(sums[:-1] / sums[-1].clamp_min(1), share)

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        from torch.nn.functional import cross_entropy

        batch = only_batch(batch)
        logits, labels = self.logits(model, batch, 1), batch.targets[PSEUDO_LABEL]
        return {ROW: cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")}


def _shares(feeds: Sequence[Feed]) -> tuple[float, ...]:
    """Of each class among all rows; a class without a row counts as if it had one.

    Raises `ConfigError` for labels that are not counted.
    """
    counts = [0] * max(len(feed.label_names or ()) for feed in feeds)
    for feed in feeds:
        if feed.label_counts is None:
            raise ConfigError("class_shares=labelled needs labels that are counted: give the shares.")
        for label, count in enumerate(feed.label_counts):
            counts[label] += count
    counts = [max(count, 1) for count in counts]
    return tuple(count / sum(counts) for count in counts)


def class_factors(confident_share_K: Tensor) -> Tensor:
    """FlexMatch's factor of each class's threshold, from 0 to 1 (Zhang et al. 2021, equations 7, 11 and 12).

    `confident_share_K` has the share of all unlabelled rows that are confidently of each class.
    """
    unsure = 1 - confident_share_K.sum()
    relative_K = confident_share_K / confident_share_K.max().maximum(unsure)
    return relative_K / (2 - relative_K)
