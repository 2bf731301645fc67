"""How well embeddings find what belongs together: ranks of positives, and rank correlation with scores.

Shape letters: N sequences, K texts of each (text, positive, negatives), C elements of an embedding,
Q queries, D candidates, P pairs of a query and a candidate that is relevant to it.
"""

import torch
from torch import Tensor

_ROWS_AT_A_TIME = 1024


def retrieval_metrics(vectors_NKC: Tensor, hashes_NK: Tensor) -> dict[str, float]:
    """Success and recall at 1, recall at 10, mean reciprocal rank and mean average precision of the queries.

    The queries are the distinct texts; the candidates are the distinct positives and negatives, by cosine.
    All positives of equal texts are relevant to them. Recall at k is the share of these among the first k,
    success at 1 the share of queries whose first is one of them. Of candidates equally near all rank last, as
    in scikit-learn: vectors that are all alike find nothing.
    """
    vectors_NKC = torch.nn.functional.normalize(vectors_NKC.double(), dim=-1)
    num_sequences = len(vectors_NKC)
    query_of_N, first_of_Q = _distinct(hashes_NK[:, 0])
    candidate_of, first_of_D = _distinct(hashes_NK[:, 1:].T.flatten())
    queries_QC = vectors_NKC[first_of_Q, 0]
    candidates_DC = vectors_NKC[:, 1:].transpose(0, 1).flatten(0, 1)[first_of_D]
    # The positives are the first N of the candidates' texts.
    pairs = torch.stack([query_of_N, candidate_of[:num_sequences]], dim=1)
    pairs_P2: Tensor = torch.unique(pairs, dim=0)
    num_queries, num_candidates = len(queries_QC), len(candidates_DC)
    totals = torch.zeros(5, dtype=torch.float64, device=vectors_NKC.device)
    for start in range(0, num_queries, _ROWS_AT_A_TIME):
        rows_QC = queries_QC[start : start + _ROWS_AT_A_TIME]
        of_rows = (pairs_P2[:, 0] >= start) & (pairs_P2[:, 0] < start + len(rows_QC))
        row_P, candidate_P = pairs_P2[of_rows, 0] - start, pairs_P2[of_rows, 1]
        is_relevant_QD = rows_QC.new_zeros(len(rows_QC), num_candidates, dtype=torch.bool)
        is_relevant_QD[row_P, candidate_P] = True
        totals += _summed_metrics(rows_QC @ candidates_DC.T, is_relevant_QD, row_P, candidate_P)
    names = ("recall_at_1", "recall_at_10", "mrr", "map", "success_at_1")
    return dict(zip(names, (totals / max(num_queries, 1)).tolist(), strict=True))


def _summed_metrics(
    similarity_QD: Tensor, is_relevant_QD: Tensor, row_P: Tensor, candidate_P: Tensor
) -> Tensor:
    """Recall at 1 and 10, reciprocal rank, average precision and success [5], summed over the queries."""
    ranks, precisions = [], []
    for pairs in torch.split(torch.stack([row_P, candidate_P], dim=1), _ROWS_AT_A_TIME):
        rows, candidates = pairs.unbind(dim=1)
        is_before = similarity_QD[rows] >= similarity_QD[rows, candidates, None]
        rank = is_before.sum(dim=1).double()
        ranks.append(rank)
        precisions.append((is_before & is_relevant_QD[rows]).sum(dim=1) / rank)
    rank_P, precision_P = torch.cat(ranks), torch.cat(precisions)
    weight_P = 1 / is_relevant_QD.sum(dim=1).double()[row_P]
    best_Q = similarity_QD.new_full((len(similarity_QD),), torch.inf)
    best_Q = best_Q.scatter_reduce(0, row_P, rank_P, "amin")
    return torch.stack(
        [
            ((rank_P <= 1) * weight_P).sum(),
            ((rank_P <= 10) * weight_P).sum(),
            (1 / best_Q).sum(),
            (precision_P * weight_P).sum(),
            (best_Q <= 1).sum(),
        ]
    )


def _distinct(hashes: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each text among the distinct ones, and the index at which each of those first occurs."""
    distinct, number = torch.unique(hashes, return_inverse=True)
    indices = torch.arange(len(hashes), device=hashes.device)
    first = torch.full((len(distinct),), len(hashes), device=hashes.device)
    return number, first.scatter_reduce(0, number, indices, "amin")


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of two vectors; equal values have the mean of their ranks.

    0 where one of them is constant, for which it is not defined.
    """
    return pearson(_mean_ranks(x), _mean_ranks(y))


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two vectors, computed in fp64; 0 where one of them is constant."""
    values = torch.stack([x.double(), y.double()])
    centred = values - values.mean(dim=1, keepdim=True)
    norms = centred.norm(dim=1).prod()
    return float((centred[0] * centred[1]).sum() / norms) if norms > 0 else 0.0


def _mean_ranks(values: Tensor) -> Tensor:
    found = torch.unique(values, return_inverse=True, return_counts=True)
    number: Tensor = found[1]
    counts: Tensor = found[2]
    return (counts.cumsum(0).double() - (counts - 1) / 2)[number]
