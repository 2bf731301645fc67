"""Next-token prediction; the labels decide which tokens count: whole documents or completions only."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from distft.config import Settings
from distft.data.batch import Batch
from distft.errors import ConfigError
from distft.model.config import Head, LanguageModelHead
from distft.model.transformer import HiddenLossFn
from distft.objective.cross_entropy import FusedLinearCrossEntropy, LossAndNumCorrect


class CausalLM(Settings):
    """Cross entropy of every target token: labels other than `ignore_index`."""

    type: Literal["causal_lm"] = "causal_lm"
    z_loss: float = Field(0.0, ge=0, allow_inf_nan=False)  # weight of logsumexp**2, against drifting logits
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    def head(self, label_names: tuple[str, ...] | None) -> Head:
        """The head that this objective trains. Raises `ConfigError` for labelled data."""
        if label_names is not None:
            raise ConfigError(
                "objective.type=causal_lm cannot learn labels: set objective.type=classification."
            )
        return LanguageModelHead()

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """The loss summed over the batch's target tokens, an fp32 scalar."""
        loss_fn = FusedLinearCrossEntropy(_vocab_size(model), self.z_loss, self.label_smoothing)
        return _forward(model, batch, loss_fn)

    @torch.no_grad()
    def evaluate(self, model: Callable[..., Tensor], batch: Batch) -> dict[str, Tensor]:
        """`sums`, float64 [4]: loss, correct predictions, target tokens and target bytes of the batch."""
        sums = _forward(model, batch, LossAndNumCorrect(_vocab_size(model)))
        counts = torch.tensor([batch.num_target_tokens, batch.num_target_bytes], dtype=torch.float64)
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


def _forward(model: Callable[..., Tensor], batch: Batch, loss_from_hidden: HiddenLossFn) -> Tensor:
    return model(
        batch.input_ids,
        batch.position_ids,
        batch.document_ids,
        batch.lengths,
        labels=batch.labels,
        loss_from_hidden=loss_from_hidden,
    )


def _vocab_size(model: Any) -> int:
    """`model` is a Transformer, or an engine's bound method `model`, whose engine has it as `module`."""
    owner = getattr(model, "__self__", model)
    module = getattr(owner, "module", owner)
    return int(module.config.vocab_size)
