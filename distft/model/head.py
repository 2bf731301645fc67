"""What a Transformer ends in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

# (hidden [N, d_model], weight [padded_vocab_size, d_model], labels [N]) -> whatever the caller wants of them.
FromHidden: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LanguageModelHead:
    """A score for every piece of the vocabulary at every position: module `lm_head`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationHead:
    """A score for every class, once a row: module `classifier`."""

    num_labels: int
    pooling: Literal["last", "mean", "first"] = "last"  # over the row's real tokens


Head: TypeAlias = LanguageModelHead | ClassificationHead
