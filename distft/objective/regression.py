"""Regression: a number per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from distft.data.dataset import ClassNames, Labels, TransformContext
from distft.data.targets import IGNORE_INDEX, NUMBER, ROW
from distft.errors import ConfigError
from distft.model.heads import Heads
from distft.objective.interface import Model, ObjectiveContext, only_batch
from distft.objective.row_objective import RowObjective, require_targets

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch
    from distft.data.feed import AnyFeed, Transform
    from distft.model.config import ModelConfig


# Of (number - offset) / scale: float32 holds the sum of the squares of 1e8 of them.
_MOST_SCALED = 1e15
_LEAST_SCALE = 1e-30


class Regression(RowObjective):
    """Squared or Huber error of `offset + scale * output`, in units of `scale`.

    By default the numbers of the training data are standardised: their mean becomes 0 and their deviation 1.
    """

    type: Literal["regression"] = "regression"
    loss: Literal["squared", "huber"] = "squared"
    huber_delta: float = Field(1.0, gt=0)  # of the scaled error, from which on the loss is linear
    offset: float | None = Field(None, allow_inf_nan=False)  # null: the mean of the training data's numbers
    # null: their standard deviation; 1 if they are all equal.
    scale: float | None = Field(None, ge=_LEAST_SCALE, allow_inf_nan=False)

    def heads(self, label_names: Labels) -> Heads:  # noqa: ARG002
        return {self.head_name: self.row_head(1)}

    @property
    def row_labels(self) -> str:
        return "number"

    def resolved(self, model: ModelConfig, train: AnyFeed | None) -> Self:
        own, numbers = super().resolved(model, train), getattr(train, "numbers", None)
        if numbers is None:
            return own
        standard = {"offset": numbers.mean, "scale": max(numbers.deviation or 1.0, _LEAST_SCALE)}
        return own.model_copy(update={k: v for k, v in standard.items() if getattr(self, k) is None})

    def notes(self, context: TransformContext) -> Sequence[str]:  # noqa: ARG002
        return (f"a number is learnt as (number - {self._offset:.6g}) / {self._scale:.6g}",)

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        remedy = "set data.type=labelled with labels=number"
        require_targets(context, NUMBER, "objective.type=regression", remedy)
        numbers = () if context.numbers is None else (context.numbers.least, context.numbers.most)
        for number in numbers:
            scaled = (number - self._offset) / self._scale
            if not abs(scaled) <= _MOST_SCALED:
                raise ConfigError(
                    f"objective.offset={self._offset:g} and objective.scale={self._scale:g} make {scaled:g} "
                    f"of the number {number:g} of the data, and its loss would be infinite: set them near "
                    "the mean and the deviation of the numbers, or leave them out."
                )
        return ()

    @property
    def _offset(self) -> float:
        return 0.0 if self.offset is None else self.offset

    @property
    def _scale(self) -> float:
        return 1.0 if self.scale is None else self.scale

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {NUMBER: 1.0}

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        targets = only_batch(batch).targets
        counts = targets[ROW] != IGNORE_INDEX
        # The gradient of a row that does not count is 0 times its error, which must be finite for that.
        numbers = targets[NUMBER].where(counts, self._offset)
        losses = self._losses(self.outputs(model, only_batch(batch))[:, 0], numbers)
        return {NUMBER: losses.where(counts, 0.0).sum()}

    def _losses(self, outputs_B: Tensor, numbers_B: Tensor) -> Tensor:
        from torch.nn.functional import huber_loss, mse_loss

        # In float64: numbers that differ only in their last digits, such as times, still differ.
        scaled_B = ((numbers_B.double() - self._offset) / self._scale).to(outputs_B.dtype)
        if self.loss == "huber":
            return huber_loss(outputs_B, scaled_B, reduction="none", delta=self.huber_delta)
        return mse_loss(outputs_B, scaled_B, reduction="none")

    def predictions(
        self,
        outputs_BK: Tensor,
        label_names: ClassNames | None,  # noqa: ARG002
    ) -> Sequence[Mapping[str, Any]]:
        return [{"number": number} for number in (self._offset + self._scale * outputs_BK[:, 0]).tolist()]

    @property
    def per_row(self) -> frozenset[str]:
        return frozenset({"predictions", "numbers"})

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:  # noqa: ARG002
        """The rows' predictions and numbers, float64, and the summed loss."""
        import torch

        with torch.no_grad():
            outputs = self.outputs(model, only_batch(batch))[:, 0].double()
        counts = only_batch(batch).targets[ROW] != IGNORE_INDEX
        outputs, numbers = outputs[counts], only_batch(batch).targets[NUMBER][counts].double()
        return {
            "loss_sum": self._losses(outputs, numbers).sum(),
            "predictions": self._offset + self._scale * outputs,
            "numbers": numbers,
        }

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss, mean absolute error in the data's units, and correlations (0 where one side is constant)."""
        from distft.objective.retrieval import pearson, spearman

        predictions, numbers = sums["predictions"], sums["numbers"]
        num_rows = max(len(numbers), 1)
        return {
            "loss": float(sums["loss_sum"] / num_rows),
            "mean_absolute_error": float((predictions - numbers).abs().sum() / num_rows),
            "pearson": pearson(predictions, numbers),
            "spearman": spearman(predictions, numbers),
        }

    def report(self, sums: Mapping[str, Tensor], label_names: Labels) -> Sequence[str]:  # noqa: ARG002
        """The 95 % intervals of the correlations."""
        from distft.objective.intervals import correlation_interval

        found, lines = self.metrics(sums), []
        for name, method in (("pearson", "Fisher"), ("spearman", "Bonett and Wright")):
            interval = correlation_interval(found[name], len(sums["numbers"]), is_of_ranks=name == "spearman")
            if interval is not None:
                lines.append(f"95 % interval of {name} ({method}): {interval[0]:.4f} to {interval[1]:.4f}")
        return lines
