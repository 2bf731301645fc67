"""What a model and an objective are given: one micro-batch of token rows."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100  # a label that does not count in the loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows of tokens, with what counts in the loss.

    B rows of T tokens. `labels` is [B, T] (the token to be predicted at each position) or [B] (a class a
    row); `IGNORE_INDEX` does not count. `num_target_tokens` counts the labels that do: tokens or rows.
    """

    input_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T] or [B]
    num_target_tokens: int
    position_ids: Tensor | None = None  # int64 [B, T]; None: 0, 1, 2, ...
    document_ids: Tensor | None = None  # int64 [B, T]; attention stays among equal ids; None: one a row
    lengths: Tensor | None = None  # int64 [B]: real tokens at the start of each row, the rest is padding
    num_target_bytes: int = 0  # UTF-8 bytes that the target tokens stand for; 0 where it is not known

    def to(self, device: torch.device) -> "Batch":
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)
