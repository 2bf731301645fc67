"""Regression: a number per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distft.data.dataset import Labels, TransformContext
from distft.data.targets import IGNORE_INDEX, NUMBER, ROW
from distft.errors import ConfigError
from distft.model.config import ClassificationHead, Heads
from distft.objective.interface import Model, ObjectiveContext, only_batch
from distft.objective.row_objective import RowObjective, require_targets

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch
    from distft.data.feed import Transform


# Of (number - offset) / scale: float32 holds the sum of the squares of 1e8 of them.
_MOST_SCALED = 1e15


class Regression(RowObjective):
    """Squared or Huber error of `offset + scale * output`, in units of `scale`; the output has no bias."""

    type: Literal["regression"] = "regression"
    loss: Literal["squared", "huber"] = "squared"
    huber_delta: float = Field(1.0, gt=0)  # of the scaled error, from which on the loss is linear
    offset: float = 0.0  # such as the mean of the numbers; the log of a start tells it
    scale: float = Field(1.0, ge=1e-30, allow_inf_nan=False)  # such as their standard deviation

    def heads(self, label_names: Labels) -> Heads:  # noqa: ARG002
        return {self.head_name: ClassificationHead(num_labels=1, pooling=self.pooling)}

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        remedy = "set data.type=labelled with labels=number"
        require_targets(context, NUMBER, "objective.type=regression", remedy)
        for number in context.number_range or ():
            scaled = (number - self.offset) / self.scale
            if not abs(scaled) <= _MOST_SCALED:
                raise ConfigError(
                    f"objective.offset={self.offset:g} and objective.scale={self.scale:g} make {scaled:g} of "
                    f"the number {number:g} of the data, and its loss would be infinite: set them near the "
                    "mean and the deviation of the numbers."
                )
        return ()

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {NUMBER: 1.0}

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        targets = only_batch(batch).targets
        counts = targets[ROW] != IGNORE_INDEX
        # The gradient of a row that does not count is 0 times its error, which must be finite for that.
        numbers = targets[NUMBER].where(counts, self.offset)
        losses = self._losses(self.outputs(model, only_batch(batch))[:, 0], numbers)
        return {NUMBER: losses.where(counts, 0.0).sum()}

    def _losses(self, outputs_B: Tensor, numbers_B: Tensor) -> Tensor:
        from torch.nn.functional import huber_loss, mse_loss

        # In float64: numbers that differ only in their last digits, such as times, still differ.
        scaled_B = ((numbers_B.double() - self.offset) / self.scale).to(outputs_B.dtype)
        if self.loss == "huber":
            return huber_loss(outputs_B, scaled_B, reduction="none", delta=self.huber_delta)
        return mse_loss(outputs_B, scaled_B, reduction="none")

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
            "predictions": self.offset + self.scale * outputs,
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
