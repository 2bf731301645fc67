"""`LanguageModelObjective`, the base of objectives that predict tokens with the head `lm_head`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from distft.data.dataset import Labels, TransformContext
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.model.heads import LANGUAGE_MODEL, Heads
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import Model, Objective, ObjectiveContext, only_batch

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch, Batch
    from distft.model.layout import HiddenLossFn
    from distft.objective.cross_entropy import FusedLinearCrossEntropy, LossAndNumCorrect


class LanguageModelObjective(Objective):
    """Cross entropy of every target token: targets `target_name` other than `IGNORE_INDEX`."""

    z_loss: float = Field(0.0, ge=0, allow_inf_nan=False)  # weight of logsumexp**2, against drifting logits
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    target_name: ClassVar[str] = NEXT_TOKEN
    has_few_targets: ClassVar[bool] = False  # then logits are computed of the positions with a target alone

    def heads(self, label_names: Labels) -> Heads:  # noqa: ARG002
        """`lm_head`."""
        return LANGUAGE_MODEL

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {self.target_name: 1.0}

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        return {self.target_name: only_batch(batch).num_targets[self.target_name]}

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:
        from distft.objective.cross_entropy import FusedLinearCrossEntropy

        loss_fn = FusedLinearCrossEntropy(
            context.vocab_size, self.z_loss, self.label_smoothing, compiles=context.compiles
        )
        return {self.target_name: self._forward(model, only_batch(batch), loss_fn)}

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:
        """`sums`, float64 [4]: loss, correct predictions, target tokens and target bytes of the batch."""
        import torch

        from distft.objective.cross_entropy import LossAndNumCorrect

        rows = only_batch(batch)
        with torch.no_grad():
            sums = self._forward(model, rows, LossAndNumCorrect(context.vocab_size))
        return {"sums": with_counts(sums, rows, self.target_name)}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss without smoothing and z-loss, perplexity, accuracy; bits per byte where bytes are known."""
        return token_metrics(sums["sums"])

    def _forward(
        self, model: Model, rows: Batch, loss_fn: FusedLinearCrossEntropy | LossAndNumCorrect
    ) -> Tensor:
        losses = hidden_losses(rows, loss_fn, self.target_name, has_few_targets=self.has_few_targets)
        return model(**rows.model_inputs, heads=("lm_head",), losses_from_hidden=losses)["lm_head"]


def hidden_losses(
    rows: Batch,
    loss_fn: FusedLinearCrossEntropy | LossAndNumCorrect,
    target_name: str,
    *,
    has_few_targets: bool,
) -> dict[str, HiddenLossFn]:
    """The model's `losses_from_hidden`: `loss_fn` with these rows' targets."""
    import torch

    labels_N = rows.targets[target_name].flatten()

    def loss_from_hidden(hidden_NC: Tensor, weight_VC: Tensor, softcap: float | None = None) -> Tensor:
        if not has_few_targets:
            return loss_fn(hidden_NC, weight_VC, labels_N=labels_N, softcap=softcap)
        # The number of targets is known on the host, so that a GPU need not be waited for.
        counts_N = labels_N != IGNORE_INDEX
        positions = torch.nonzero_static(counts_N, size=rows.num_targets[target_name])[:, 0]
        return loss_fn(hidden_NC[positions], weight_VC, labels_N=labels_N[positions], softcap=softcap)

    return {"lm_head": loss_from_hidden}


def with_counts(sums: Tensor, rows: Batch, target_name: str) -> Tensor:
    """Loss and correct predictions [2], and after them the numbers of targets and of their bytes."""
    import torch

    counts = torch.tensor([rows.num_targets[target_name], rows.num_target_bytes], dtype=torch.float64)
    return torch.cat([sums, counts.to(sums.device)])


def token_metrics(sums: Tensor) -> dict[str, float]:
    """Metrics of the four sums that `with_counts` describes."""
    loss_sum, num_correct, num_tokens, num_bytes = sums.tolist()
    loss = loss_sum / max(num_tokens, 1)
    metrics = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # exp overflows from 710 on
        "accuracy": num_correct / max(num_tokens, 1),
    }
    if num_bytes:
        metrics["bits_per_byte"] = loss_sum / num_bytes / math.log(2)
    return metrics


def require_no_labels(label_names: Labels, objective: str) -> None:
    """Raise `ConfigError` for labelled data."""
    if label_names is not None:
        raise ConfigError(
            f"objective.type={objective} cannot learn labels: set objective.type=classification."
        )


def first_row(context: TransformContext, objective: str) -> Batch:
    """A row of the data. Raises `ConfigError` if it has no next tokens as targets, such as one of a pair."""
    import numpy as np

    row = context.rows(np.zeros(1, np.int64))
    if NEXT_TOKEN not in row.targets:
        raise ConfigError(
            f"objective.type={objective} continues texts, and these rows are none: set data.type=tokens, "
            "completion or conversations."
        )
    return row


def require_targets_behind_prefix(model: ModelConfig, objective: str) -> None:
    """Raise `ConfigError` for a model that cannot predict the tokens behind a prefix, one after another."""
    if not model.is_encoder_decoder:
        require_causal(model, objective)


def require_causal(model: ModelConfig, objective: str) -> None:
    """Raise `ConfigError` for a bidirectional model, and for an encoder with a decoder."""
    if model.is_encoder_decoder:
        raise ConfigError(
            f"objective.type={objective} with model.type=encoder_decoder: its rows have no source for the "
            "encoder. Set objective.type=prefix_lm or span_corruption, or model.type=transformer."
        )
    setting = f"model.{model.direction_setting}"
    if not model.is_causal:
        raise ConfigError(
            f"{setting}=bidirectional with objective.type={objective}: every token sees the one that it has "
            f"to predict. Set {setting}=causal, or another objective."
        )


def require_bidirectional(model: ModelConfig, objective: str) -> None:
    """Raise `ConfigError` for a causal model, and for an encoder with a decoder."""
    if model.is_encoder_decoder:
        raise ConfigError(
            f"objective.type={objective} with model.type=encoder_decoder: its decoder would learn nothing. "
            "Set objective.type=span_corruption, or model.type=transformer."
        )
    setting = f"model.{model.direction_setting}"
    if model.is_causal:
        raise ConfigError(
            f"{setting}=causal with objective.type={objective}: a masked token would be predicted from the "
            f"tokens before it alone. Set {setting}=bidirectional, or objective.type=causal_lm."
        )


def require_transformer(model: ModelConfig, objective: str, reason: str) -> None:
    """Raise `ConfigError` for another type of model, which cannot do what `reason` says."""
    if not isinstance(model, TransformerConfig):
        raise ConfigError(
            f"objective.type={objective} needs model.type=transformer: {reason}. Set one of them anew."
        )
