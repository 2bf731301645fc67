"""What objectives with one target a row have in common: a head over the row's pooled hidden states."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distft.data.dataset import ClassNames
from distft.errors import ConfigError
from distft.model.heads import ClassificationHead, HeadName, HiddenLayer
from distft.objective.interface import Model, only_batch
from distft.objective.pooled import PooledObjective

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch, Batch
    from distft.data.dataset import TransformContext


class RowObjective(PooledObjective):
    """An objective whose terms are sums over rows."""

    head: HeadName | None = None  # name of its parameters; null: classifier, in a mixture that of its part
    # A layer with this activation before the output; with one, both have biases. BERT and RoBERTa: tanh;
    # ModernBERT: gelu_norm, without a bias of the layer, and with a norm behind it.
    hidden: HiddenLayer = "none"

    @property
    def needs_text(self) -> bool:
        return False

    def row_head(self, num_outputs: int) -> ClassificationHead:
        """The head over a row's vector."""
        return ClassificationHead(num_labels=num_outputs, pooling=self.head_pooling, hidden=self.hidden)

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        counts = only_batch(batch).num_targets
        return {name: counts[name] for name in self.term_weights(0)}

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        """float32 [B, K]: the head's outputs for each row."""
        return model(**batch.model_inputs, heads=(self.head_name,))[self.head_name].float()

    @abstractmethod
    def predictions(self, outputs_BK: Tensor, label_names: ClassNames | None) -> Sequence[Mapping[str, Any]]:
        """Of each row what its `outputs` mean, as plain data for a file of predictions."""

    @property
    def head_name(self) -> str:
        return self.head or "classifier"


def require_targets(context: TransformContext, target: str, objective: str, remedy: str) -> None:
    """Raise `ConfigError` if the data's rows have no targets of that name."""
    import numpy as np

    if target not in context.rows(np.zeros(1, np.int64)).targets:
        raise ConfigError(f"{objective} does not fit the labels of its data: {remedy}.")
