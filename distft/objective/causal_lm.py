"""Next-token prediction, over whole documents or over completions alone: the labels decide."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from distft.config import Settings
from distft.data.batch import Batch
from distft.errors import ConfigError
from distft.model.head import Head, LanguageModelHead
from distft.objective.cross_entropy import CrossEntropyScore, CrossEntropySum


class CausalLM(Settings):
    """Cross entropy of each label that counts."""

    type: Literal["causal_lm"] = "causal_lm"
    z_loss: float = Field(0.0, ge=0, allow_inf_nan=False)  # weight of logsumexp**2, against drifting logits
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    def head(self, label_names: tuple[str, ...] | None) -> Head:
        """The head that the objective needs. Raises `ConfigError` for labelled data."""
        if label_names is not None:
            raise ConfigError(
                "objective.type=causal_lm cannot learn labels: set objective.type=classification."
            )
        return LanguageModelHead()

    def __call__(self, model: Callable[..., Any], batch: Batch, *, vocab_size: int | None = None) -> Tensor:
        """The loss summed over the batch's targets: an fp32 scalar."""
        terms = CrossEntropySum(vocab_size or _vocab_size(model), self.z_loss, self.label_smoothing)
        loss: Tensor = _forward(model, batch, terms)
        return loss

    @torch.no_grad()
    def evaluate(self, model: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
        """Sums over the batch, float64."""
        sums = _forward(model, batch, CrossEntropyScore(_vocab_size(model)))
        counts = torch.tensor([batch.num_target_tokens, batch.num_target_bytes], dtype=torch.float64)
        return {"sums": torch.cat([sums, counts.to(sums.device)])}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Plain loss (no smoothing, no z-loss), perplexity, accuracy; bits per byte where bytes are known."""
        loss_sum, num_correct, num_tokens, num_bytes = sums["sums"].tolist()
        loss = loss_sum / max(num_tokens, 1)
        metrics = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "accuracy": num_correct / max(num_tokens, 1),
        }
        if num_bytes:
            metrics["bits_per_byte"] = loss_sum / num_bytes / math.log(2)
        return metrics


def _forward(model: Callable[..., Any], batch: Batch, reduce: Callable[..., Tensor]) -> Tensor:
    found: Tensor = model(
        batch.input_ids,
        batch.position_ids,
        batch.document_ids,
        batch.lengths,
        labels=batch.labels,
        reduce=reduce,
    )
    return found


def _vocab_size(model: Any) -> int:
    owner = getattr(model, "__self__", model)
    module = getattr(owner, "module", owner)
    return int(module.config.vocab_size)
