"""How the members of an ensemble of classifiers make one prediction: mean, vote, or weights. Arithmetic only.

Shape letters: M members, N rows, K classes.
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Combine: TypeAlias = Literal["mean", "vote", "weights"]
COMBINE: tuple[str, ...] = get_args(Combine)

_TIE = (
    1e-6  # how much the mean counts beside votes, of which each counts 1 / M: it decides between equal ones
)
_MOST_ROUNDS = 10_000
_LEAST_GAIN = 1e-12  # of the mean log-likelihood, in a round


def combined(log_p_MNK: Tensor, how: Combine, weights: Sequence[float] = ()) -> Tensor:
    """The ensemble's logarithms of probabilities [N, K], float64, of those of its members.

    `vote`: a label's probability is its share of the members' labels; equal ones are told apart by the mean.
    """
    p_MNK = log_p_MNK.double().exp()
    if how == "weights":
        p_NK = torch.einsum("m,mnk->nk", p_MNK.new_tensor(weights), p_MNK)
    elif how == "mean":
        p_NK = p_MNK.mean(dim=0)
    else:
        votes_MNK = torch.nn.functional.one_hot(p_MNK.argmax(dim=2), p_MNK.shape[2])
        p_NK = (votes_MNK.double().mean(dim=0) + _TIE * p_MNK.mean(dim=0)) / (1 + _TIE)
    return p_NK.log()


def best_weights(log_p_MN: Tensor) -> list[float]:
    """Of each member, at least 0 and 1 in all: those that make the labels most likely.

    `log_p_MN` are each member's logarithms of the probability of each row's label. The mean log-likelihood of
    a mixture is concave in its weights, and expectation maximisation climbs to its maximum.
    """
    p_MN = (log_p_MN.double() - log_p_MN.double().amax(dim=0)).exp()
    weights_M = p_MN.new_full((len(p_MN),), 1 / len(p_MN))
    before = -torch.inf
    for _ in range(_MOST_ROUNDS):
        shares_MN = weights_M[:, None] * p_MN
        totals_N = shares_MN.sum(dim=0)
        likelihood = float(totals_N.log().mean())
        if likelihood - before < _LEAST_GAIN:
            break
        before, weights_M = likelihood, (shares_MN / totals_N).mean(dim=1)
    return [float(weight) for weight in weights_M]
