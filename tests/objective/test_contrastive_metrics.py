"""Retrieval metrics and rank correlation against scikit-learn, SciPy and loops; evaluation of embeddings."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import SIZES, build

from distft.collectives import SingleProcess
from distft.data.batch import RaggedArray
from distft.data.dataset import DataContext, TransformContext
from distft.data.feed import Feed
from distft.data.pairs_rows import PairRows
from distft.model.transformer_config import TransformerConfig
from distft.objective.contrastive import Contrastive
from distft.objective.interface import ObjectiveContext
from distft.objective.retrieval import retrieval_metrics, spearman
from distft.train.evaluation import evaluate

CONTEXT = ObjectiveContext(61, SingleProcess())


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=3, max_size=30))
def test_spearman_is_that_of_scipy_with_ties(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import spearmanr

    x, y = np.array(pairs, np.float64).T
    found = spearman(torch.from_numpy(x), torch.from_numpy(y))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert found == 0.0
    else:
        assert found == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(2, 3))
def test_retrieval_metrics_equal_those_of_scikit_learn_and_of_loops(
    seed: int, num_sequences: int, num_texts: int
) -> None:
    from sklearn.metrics import label_ranking_average_precision_score

    source = np.random.default_rng(seed)
    texts = source.integers(0, 2 * num_sequences, (num_sequences, num_texts))  # some of them equal
    table = source.normal(size=(2 * num_sequences, 5))
    vectors = torch.from_numpy(table[texts])
    found = retrieval_metrics(vectors, torch.from_numpy(texts))
    queries, candidates = np.unique(texts[:, 0]), np.unique(texts[:, 1:])
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    similarity = unit[queries] @ unit[candidates].T
    is_relevant = np.array(
        [[any((texts[:, 0] == q) & (texts[:, 1] == c)) for c in candidates] for q in queries]
    )
    if len(candidates) > 1:  # scikit-learn needs two
        expected = label_ranking_average_precision_score(is_relevant, similarity)
        assert found["map"] == pytest.approx(expected, abs=1e-12)
    recalls: dict[int, list[float]] = {1: [], 10: []}
    reciprocal = []
    for row, relevant in zip(similarity, is_relevant, strict=True):
        order = np.argsort(-row)
        reciprocal.append(1 / (1 + int(np.flatnonzero(relevant[order])[0])))
        for k, of_k in recalls.items():
            of_k.append(relevant[order[:k]].sum() / relevant.sum())
    assert found["mrr"] == pytest.approx(np.mean(reciprocal))
    assert found["recall_at_1"] == pytest.approx(np.mean(recalls[1]))
    assert found["recall_at_10"] == pytest.approx(np.mean(recalls[10]))
    assert found["success_at_1"] == pytest.approx(np.mean([share > 0 for share in recalls[1]]))


def test_vectors_that_are_all_alike_find_nothing() -> None:
    found = retrieval_metrics(torch.ones(20, 2, 4), torch.arange(40).view(20, 2))
    nothing = {"recall_at_1": 0.0, "recall_at_10": 0.0, "mrr": 1 / 20, "map": 1 / 20, "success_at_1": 0.0}
    assert found == nothing


def pairs_feed(objective: Contrastive, *, scores: bool = False, num_texts: int = 2) -> Feed:
    source = np.random.default_rng(1)
    texts = [source.integers(0, 61, source.integers(1, 20)).tolist() for _ in range(17 * num_texts)]
    of_rows = source.normal(size=17).repeat(num_texts) if scores else None
    feed = Feed.for_evaluation(PairRows(RaggedArray(texts), num_texts, scores=of_rows))
    data = DataContext(
        seq_len=24,
        vocab_size=61,
        encode=lambda _: [],
        tokenizer_fingerprint="none",
        global_batch_size=8,
    )
    own = TransformContext(data=data, seed=1, num_sequences=feed.num_sequences, rows=feed.rows)
    return feed.with_transforms(*objective.transforms(own))


def metrics_of(objective: Contrastive, feed: Feed, micro_batch_size: int) -> dict[str, float]:
    model = build(TransformerConfig(**SIZES, attention="bidirectional", dropout=0.1), objective.heads(None))
    return evaluate(
        model,
        model,
        objective,
        feed,
        context=CONTEXT,
        micro_batch_size=micro_batch_size,
        seq_len=24,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("settings", [{}, {"learns_temperature": True, "symmetric": True}])
def test_the_metrics_are_of_the_whole_data_however_it_is_cut(settings: dict[str, Any]) -> None:
    objective = Contrastive(**settings)
    feed = pairs_feed(objective, num_texts=3)
    whole = metrics_of(objective, feed, 17)
    found = {"recall_at_1", "recall_at_10", "mrr", "map", "success_at_1"}
    both_ways = found | {f"reverse_{name}" for name in found} if objective.symmetric else found
    assert set(whole) == {"loss"} | both_ways
    for micro_batch_size in (1, 4):
        assert metrics_of(objective, feed, micro_batch_size) == pytest.approx(whole, rel=1e-5)


def test_scores_are_compared_with_cosines() -> None:
    from scipy.stats import spearmanr

    objective = Contrastive()
    feed = pairs_feed(objective, scores=True)
    found = metrics_of(objective, feed, 5)
    assert set(found) == {"loss", "spearman"}
    model = build(TransformerConfig(**SIZES, attention="bidirectional"), objective.heads(None))
    cosines, scores = [], []
    for index in range(17):
        batch = feed.batch(index, index + 1)
        with torch.no_grad():
            one, other = (
                model(row[None, :length])["embedding"][0]
                for row, length in zip(batch.input_ids, batch.lengths, strict=True)
            )
        cosines.append(float(torch.nn.functional.cosine_similarity(one, other, dim=0)))
        scores.append(float(batch.targets["score"][0]))
    assert found["spearman"] == pytest.approx(spearmanr(cosines, scores).statistic, abs=1e-9)


def test_copies_that_only_dropout_would_tell_apart_have_a_loss_alone() -> None:
    objective = Contrastive(views="dropout")
    feed = pairs_feed(objective, num_texts=1)
    assert set(metrics_of(objective, feed, 5)) == {"loss"}
