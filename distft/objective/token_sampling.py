"""Draws tokens from predictions, each by random numbers of its sequence and position alone.

Shape letters: B rows, T positions, N = B * T, M masked positions, C = d_model, V = padded_vocab_size,
K = vocab_size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from distft.data.batch import Batch
from distft.data.documents import is_real
from distft.data.targets import IGNORE_INDEX, MASKED_TOKEN, REPLACED_TOKEN, SAMPLING_KEY
from distft.keyed_random import position_keys, uniform

LossFn: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden [M, C], weight [V, C], labels [M]

_SAMPLING = 0x5241_4D50  # a use of random numbers
_CHUNK_NUMEL = 1 << 22  # elements of fp64 noise at a time: 32 MiB


@dataclass(frozen=True)
class DiscriminatorTargets:
    """A transform after masking: marks the real tokens, of which each may be replaced, and keys the draws."""

    seed: int

    def __call__(self, batch: Batch) -> Batch:
        real = torch.from_numpy(is_real(batch))
        targets = {
            **batch.targets,
            REPLACED_TOKEN: torch.where(real, 0, IGNORE_INDEX),
            SAMPLING_KEY: batch.row_keys(self.seed),
        }
        num_targets = {**batch.num_targets, REPLACED_TOKEN: int(real.sum())}
        return replace(batch, targets=targets, num_targets=num_targets)


class SampleAndLoss:
    """A `HiddenLossFn` that computes a loss of the masked positions, and draws a token for each of them."""

    def __init__(self, rows: Batch, loss_fn: LossFn, vocab_size: int) -> None:
        self._loss_fn = loss_fn
        self._vocab_size = vocab_size
        self._labels_N = rows.targets[MASKED_TOKEN].flatten()
        # The number of targets is known on the host, so that a GPU need not be waited for.
        counts_N = self._labels_N != IGNORE_INDEX
        self._positions_M = torch.nonzero_static(counts_N, size=rows.num_targets[MASKED_TOKEN])[:, 0]
        keys_BT = position_keys(rows.targets[SAMPLING_KEY], rows.input_ids.shape[1])
        self._keys_M = keys_BT.flatten()[self._positions_M]
        self._drawn_M: Tensor | None = None

    def __call__(self, hidden_NC: Tensor, weight_VC: Tensor) -> Tensor:
        hidden_MC = hidden_NC[self._positions_M]
        self._drawn_M = gumbel_draws(hidden_MC.detach(), weight_VC.detach()[: self._vocab_size], self._keys_M)
        return self._loss_fn(hidden_MC, weight_VC, self._labels_N[self._positions_M])

    def filled(self, input_ids_BT: Tensor) -> Tensor:
        """The rows with the drawn tokens in the masked places. After the call only."""
        assert self._drawn_M is not None
        filled = input_ids_BT.flatten().index_copy(0, self._positions_M, self._drawn_M)
        return filled.view_as(input_ids_BT)


@torch.no_grad()
def gumbel_draws(hidden_MC: Tensor, weight_KC: Tensor, keys_M: Tensor) -> Tensor:
    """int64 [M]: an id drawn from softmax(hidden @ weight.T) of each row, by the random numbers of its key.

    The largest of logits plus Gumbel noise is such a draw (Gumbel 1954; Maddison et al. 2014).
    """
    num_rows, vocab_size = len(hidden_MC), len(weight_KC)
    size = max(_CHUNK_NUMEL // vocab_size, 1)
    draws = []
    for start in range(0, num_rows, size):
        rows = slice(start, start + size)
        logits = (hidden_MC[rows] @ weight_KC.T).double()
        # Numbers are multiples of 2 ** -53 below 1; without 0, both logarithms are finite.
        noise = -torch.log(-torch.log(uniform(keys_M[rows], vocab_size, _SAMPLING).clamp_min(2.0**-54)))
        draws.append((logits + noise).argmax(dim=1))
    return torch.cat(draws) if draws else keys_M.new_empty(0)


def discriminator_loss_sum(logits_BT: Tensor, is_replaced_BT: Tensor, marks_BT: Tensor) -> Tensor:
    """Binary cross entropy summed over the tokens that `marks_BT` does not leave out."""
    losses = binary_cross_entropy_with_logits(logits_BT, is_replaced_BT.to(logits_BT.dtype), reduction="none")
    return losses.where(marks_BT != IGNORE_INDEX, 0.0).sum()
