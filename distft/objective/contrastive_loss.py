"""Contrastive losses of a global batch, and their gradients with respect to its embeddings.

Shape letters: N sequences of the global batch, K texts of each (text, positive, negatives), C elements of an
embedding, M queries whose loss is computed, D candidates to choose from.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, relu

from distft.collectives import Collectives

LossKind: TypeAlias = Literal["infonce", "triplet", "margin"]
_QUERIES_AT_A_TIME = 1024  # with 32,768 candidates 128 MiB of similarities


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveLoss:
    """The loss of each text against its positive and the negatives of the global batch.

    A candidate is no negative of a text if it equals the text or its positive, or is the positive of an equal
    text.
    """

    kind: LossKind
    margin: float  # of triplet and margin
    is_symmetric: bool = False  # the mean with the loss of the positives as queries for the texts
    own_negatives: bool = False  # negatives are those of the text's own sequence alone

    def of(self, vectors_NKC: Tensor, hashes_NK: Tensor, queries_M: Tensor) -> Tensor:
        """The losses [M] of the sequences `queries_M`, int64, with a gradient to all vectors.

        `hashes_NK` int64 are equal for equal texts.
        """
        num_sequences = len(vectors_NKC)
        candidates_DC = vectors_NKC[:, 1:].transpose(0, 1).flatten(0, 1)  # the positives before the negatives
        is_negative_MD = negatives_of(hashes_NK, queries_M)
        if self.own_negatives:
            owner_D = torch.arange(num_sequences, device=queries_M.device).repeat(hashes_NK.shape[1] - 1)
            is_negative_MD = is_negative_MD & (owner_D == queries_M[:, None])
        losses_M = self._one_way(vectors_NKC[queries_M, 0], candidates_DC, queries_M, is_negative_MD)
        if not self.is_symmetric:
            return losses_M
        reversed_MN = negatives_of(hashes_NK[:, :2].flip(1), queries_M)
        back_M = self._one_way(vectors_NKC[queries_M, 1], vectors_NKC[:, 0], queries_M, reversed_MN)
        return (losses_M + back_M) / 2

    def _one_way(
        self, queries_MC: Tensor, candidates_DC: Tensor, positive_M: Tensor, is_negative_MD: Tensor
    ) -> Tensor:
        """The losses of queries whose positives are the candidates `positive_M`."""
        rows = torch.arange(len(positive_M), device=positive_M.device)
        if self.kind == "infonce":
            # van den Oord et al. 2018, arXiv:1807.03748; the vectors contain the temperature.
            is_candidate_MD = is_negative_MD.clone()
            is_candidate_MD[rows, positive_M] = True
            logits_MD = (queries_MC @ candidates_DC.T).masked_fill(~is_candidate_MD, -torch.inf)
            return cross_entropy(logits_MD, positive_M, reduction="none")
        # By differences: products would lose the digits of small distances.
        distance_MD = torch.cdist(queries_MC, candidates_DC, compute_mode="donot_use_mm_for_euclid_dist")
        positive_distance_M = distance_MD[rows, positive_M]
        num_negatives_M = is_negative_MD.sum(dim=1).clamp_min(1)
        if self.kind == "triplet":  # Schroff et al. 2015, arXiv:1503.03832, without the squares
            too_near_MD = relu(self.margin + positive_distance_M[:, None] - distance_MD)
            return (too_near_MD * is_negative_MD).sum(dim=1) / num_negatives_M
        too_near_MD = relu(self.margin - distance_MD).square()  # Hadsell et al. 2006
        return positive_distance_M.square() + (too_near_MD * is_negative_MD).sum(dim=1) / num_negatives_M


def negatives_of(hashes_NK: Tensor, queries_M: Tensor) -> Tensor:
    """bool [M, (K - 1) * N]: which candidates, positives before negatives, are negatives of the queries."""
    text_M1, positive_M1 = hashes_NK[queries_M, 0, None], hashes_NK[queries_M, 1, None]
    candidate_D = hashes_NK[:, 1:].T.flatten()
    is_positive_MD = (candidate_D == text_M1) | (candidate_D == positive_M1)
    is_positive_MD[:, : len(hashes_NK)] |= hashes_NK[:, 0] == text_M1
    return ~is_positive_MD


def losses_of_all(loss: ContrastiveLoss, vectors_NKC: Tensor, hashes_NK: Tensor) -> Tensor:
    """The loss of each sequence [N], without a gradient."""
    everyone = torch.arange(len(vectors_NKC), device=vectors_NKC.device)
    with torch.no_grad():
        parts = [
            loss.of(vectors_NKC, hashes_NK, queries) for queries in torch.split(everyone, _QUERIES_AT_A_TIME)
        ]
    return torch.cat([*parts, vectors_NKC.new_zeros(0)])


def losses_and_gradients(
    loss: ContrastiveLoss, own_vectors: Tensor, own_hashes: Tensor, collectives: Collectives
) -> tuple[Tensor, Tensor]:
    """The losses [n] of this rank's n sequences against the global batch; gradients [n, K, C] of their sum.

    The gradients are those of the summed loss of all ranks. `own_vectors` is [n, K, C] and `own_hashes` int64
    [n, K]; n differs between ranks. Each rank computes the losses of its own sequences, of all candidates
    (Gao et al. 2021, arXiv:2101.06983, over ranks).
    """
    row_counts = collectives.all_gather(len(own_hashes))  # by the hosts: no device is waited for
    first = sum(row_counts[: collectives.dp_rank])
    own_queries = torch.arange(first, first + len(own_hashes), device=own_hashes.device)
    hashes = collectives.differentiable_gather(own_hashes, row_counts)
    with torch.enable_grad():
        own = own_vectors.detach().requires_grad_()
        gathered = collectives.differentiable_gather(own, row_counts)
        vectors = gathered.detach().requires_grad_()
        losses, gradient = [own.new_zeros(0)], torch.zeros_like(vectors)
        for queries in torch.split(own_queries, _QUERIES_AT_A_TIME):
            if len(queries):
                of_chunk = loss.of(vectors, hashes, queries)
                gradient += torch.autograd.grad(of_chunk.sum(), vectors)[0]
                losses.append(of_chunk.detach())
    # Collective: each rank's vectors are candidates in the losses of all ranks.
    own_gradient = gradient if gathered is own else torch.autograd.grad(gathered, own, gradient)[0]
    return torch.cat(losses), own_gradient
