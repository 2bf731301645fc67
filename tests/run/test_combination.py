"""How the predictions of several classifiers become one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.ensemble import VotingClassifier
from sklearn.linear_model import LogisticRegression

from distft.run.combination import best_weights, combined


def members(num_members: int, num_rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_members, num_rows, 4, generator=generator, dtype=torch.float64) * 2
    return logits.log_softmax(dim=2)


@pytest.mark.parametrize("voting", ["soft", "hard"])
def test_mean_and_vote_are_those_of_scikit_learn(voting: str) -> None:
    source = np.random.default_rng(0)
    features, labels = source.normal(size=(300, 5)), source.integers(0, 4, 300)
    estimators = [(str(c), LogisticRegression(C=c, max_iter=500)) for c in (1e-3, 0.1, 10.0)]
    oracle = VotingClassifier(estimators, voting=voting).fit(features, labels)
    with np.errstate(divide="ignore"):
        log_p = torch.tensor(np.stack([np.log(e.predict_proba(features)) for e in oracle.estimators_]))
    found = combined(log_p, "mean" if voting == "soft" else "vote")
    if voting == "soft":
        np.testing.assert_allclose(found.exp().numpy(), oracle.predict_proba(features), rtol=1e-12)
        return
    votes = np.sort(np.stack([e.predict(features) for e in oracle.estimators_]), axis=0)
    is_settled = (votes[0] == votes[1]) | (votes[1] == votes[2])  # two of three agree
    predicted = found.argmax(dim=1).numpy()
    assert is_settled.sum() > 250
    assert (predicted[is_settled] == oracle.predict(features)[is_settled]).all()


def test_equal_votes_are_decided_by_the_mean() -> None:
    log_p = torch.tensor([[[0.6, 0.4, 0.0]], [[0.1, 0.15, 0.75]]], dtype=torch.float64).log()
    assert int(combined(log_p, "vote").argmax()) == 2
    assert combined(log_p, "vote").exp().sum() == pytest.approx(1)


@given(st.integers(2, 5), st.integers(1, 40), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_weights_are_the_most_likely_of_the_simplex(num_members: int, num_rows: int, seed: int) -> None:
    log_p = members(num_members, num_rows, seed)[:, :, 0]
    weights = np.array(best_weights(log_p))
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    p = log_p.exp().numpy()

    def loss(w: np.ndarray) -> float:
        return float(-np.log(w @ p).mean())

    oracle = minimize(
        loss,
        np.full(num_members, 1 / num_members),
        bounds=[(1e-12, 1)] * num_members,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
    )
    assert loss(weights) <= loss(oracle.x / oracle.x.sum()) + 1e-6
    assert loss(weights) <= min(loss(row) for row in np.eye(num_members)) + 1e-9


def test_weights_make_a_mixture_of_probabilities() -> None:
    log_p = members(3, 7, 1)
    weights = [0.2, 0.3, 0.5]
    expected = sum(w * p for w, p in zip(weights, log_p.exp(), strict=True))
    torch.testing.assert_close(combined(log_p, "weights", weights).exp(), expected)


def test_a_member_that_gives_labels_no_chance_gets_no_weight_and_harms_nothing() -> None:
    log_p = torch.tensor([[-0.1, -0.2], [-1000.0, -900.0]], dtype=torch.float64)
    assert best_weights(log_p) == pytest.approx([1.0, 0.0])
