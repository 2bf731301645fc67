"""Next-token prediction; the labels decide which tokens count: whole documents or completions only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distft.data.dataset import Labels
from distft.data.targets import NEXT_TOKEN
from distft.errors import ConfigError
from distft.model.config import LANGUAGE_MODEL, Heads, ModelConfig
from distft.objective.interface import Model, Objective, ObjectiveContext, only_batch

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch
    from distft.objective.cross_entropy import FusedLinearCrossEntropy, LossAndNumCorrect


class CausalLM(Objective):
    """Cross entropy of every target token: labels other than `ignore_index`."""

    type: Literal["causal_lm"] = "causal_lm"
    z_loss: float = Field(0.0, ge=0, allow_inf_nan=False)  # weight of logsumexp**2, against drifting logits
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    def heads(self, label_names: Labels) -> Heads:
        """`lm_head`. Raises `ConfigError` for labelled data."""
        if label_names is not None:
            raise ConfigError(
                "objective.type=causal_lm cannot learn labels: set objective.type=classification."
            )
        return LANGUAGE_MODEL

    def check_model(self, model: ModelConfig) -> None:
        if not model.is_causal:
            raise ConfigError(
                "model.attention=bidirectional with objective.type=causal_lm: every token attends to the "
                "token that it has to predict. Set model.attention=causal, or another objective."
            )

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {NEXT_TOKEN: 1.0}

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        return only_batch(batch).num_targets

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:
        from distft.objective.cross_entropy import FusedLinearCrossEntropy

        loss_fn = FusedLinearCrossEntropy(
            context.vocab_size, self.z_loss, self.label_smoothing, compiles=context.compiles
        )
        return {NEXT_TOKEN: _forward(model, batch, loss_fn)}

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:
        """`sums`, float64 [4]: loss, correct predictions, target tokens and target bytes of the batch."""
        import torch

        from distft.objective.cross_entropy import LossAndNumCorrect

        with torch.no_grad():
            sums = _forward(model, batch, LossAndNumCorrect(context.vocab_size))
        rows = only_batch(batch)
        counts = torch.tensor([rows.num_targets[NEXT_TOKEN], rows.num_target_bytes], dtype=torch.float64)
        return {"sums": torch.cat([sums, counts.to(sums.device)])}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss without smoothing and z-loss, perplexity, accuracy; bits per byte where bytes are known."""
        loss_sum, num_correct, num_tokens, num_bytes = sums["sums"].tolist()
        loss = loss_sum / max(num_tokens, 1)
        metrics = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # exp overflows from 710 on
            "accuracy": num_correct / max(num_tokens, 1),
        }
        if num_bytes:
            metrics["bits_per_byte"] = loss_sum / num_bytes / math.log(2)
        return metrics


def _forward(model: Model, batch: AnyBatch, loss_fn: FusedLinearCrossEntropy | LossAndNumCorrect) -> Tensor:
    rows = only_batch(batch)
    outputs = model(
        **rows.model_inputs,
        heads=("lm_head",),
        losses_from_hidden={"lm_head": partial(loss_fn, labels_N=rows.targets[NEXT_TOKEN].flatten())},
    )
    return outputs["lm_head"]
