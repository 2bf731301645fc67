"""Losses of preferences against the formulas of their papers, row by row with transformers' own logits."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.huggingface_models import VOCAB_SIZE, load_from_hf, make_hf_model
from support.tiny_models import SIZES
from torch import Tensor

from distft.collectives import SingleProcess
from distft.config import parse
from distft.data.added_target import RowsWithTarget
from distft.data.batch import Batch, RaggedArray
from distft.data.dataset import DataContext
from distft.data.feed import Feed
from distft.data.preferences_rows import PreferenceRows
from distft.data.targets import PREFERENCE, REFERENCE_LOGP
from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig
from distft.objective import cross_entropy as cross_entropy_module
from distft.objective.cross_entropy import LogProbabilities
from distft.objective.interface import ObjectiveContext
from distft.objective.preference import SFT, Preference
from distft.objective.preference_loss import AnswerLogps, log_odds, odds_ratio_losses
from distft.objective.settings import ObjectiveConfig

BETA, SMOOTHING = 0.3, 0.2
# (tokens of the prompt, of the better and of the worse answer)
LENGTHS = [(1, 1, 16), (9, 3, 1), (3, 6, 2), (2, 1, 1)]
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {},
    "cdpo": {"label_smoothing": SMOOTHING},
    "dpo_sft": {"sft_weight": 0.4},
    "ipo": {"loss": "ipo"},
    "orpo": {"loss": "orpo"},
    "orpo_prompt": {"loss": "orpo", "sft_on_prompt": True},
}


def objective_of(**settings: Any) -> Preference:
    objective: Preference = parse(ObjectiveConfig, {"type": "preference", "beta": BETA, **settings})
    return objective


def pairs_of_tokens() -> tuple[list[list[int]], list[int]]:
    """The rows of `LENGTHS`, two a pair, and how much of each is its prompt."""
    source, rows, prompt_lengths = np.random.default_rng(2), [], []
    for prompt, *answers in LENGTHS:
        before = source.integers(0, VOCAB_SIZE, prompt).tolist()
        for length in answers:
            rows.append(before + source.integers(0, VOCAB_SIZE, length).tolist())
            prompt_lengths.append(prompt)
    return rows, prompt_lengths


def feed_of(objective: Preference, reference: Sequence[Sequence[float]] | None = None) -> Feed:
    rows, prompt_lengths = pairs_of_tokens()
    pairs: Any = PreferenceRows(RaggedArray(rows), np.array(prompt_lengths))
    if reference is not None:
        pairs = RowsWithTarget(pairs, REFERENCE_LOGP, np.array(reference, np.float32))
    feed = objective.transform_feed(Feed.for_evaluation(pairs), CONTEXT, 0)
    assert isinstance(feed, Feed)
    return feed


CONTEXT = DataContext(seq_len=17, vocab_size=VOCAB_SIZE, encode=lambda _: [], tokenizer_fingerprint="none")
ALONE = ObjectiveContext(VOCAB_SIZE, SingleProcess())


def token_logps(model: Any, row: Sequence[int]) -> Tensor:
    """Of all tokens of a row but the first, from the logits of transformers."""
    ids = torch.tensor([row])
    logp: Tensor = model(input_ids=ids[:, :-1]).logits.double().log_softmax(-1).gather(2, ids[:, 1:, None])
    return logp[0, :, 0]


def papers_losses(kind: str, policy: Any, reference: Any) -> Tensor:
    """The loss of the whole batch, by the equations of arXiv:2305.18290, 2310.12036 and 2403.07691."""
    rows, prompt_lengths = pairs_of_tokens()
    losses, of_better, num_targets = [], [], 0
    for index in range(0, len(rows), 2):
        (chosen, rejected), start = rows[index : index + 2], prompt_lengths[index] - 1
        pi, ref = (
            [token_logps(model, row)[start:] for row in (chosen, rejected)] for model in (policy, reference)
        )
        if kind.startswith("orpo"):
            odds = [torch.exp(y.mean()) / (1 - torch.exp(y.mean())) for y in pi]
            losses.append(-BETA * torch.log(1 / (1 + odds[1] / odds[0])))
        elif kind == "ipo":
            h = (pi[0] - ref[0]).mean() - (pi[1] - ref[1]).mean()
            losses.append((h - 1 / (2 * BETA)) ** 2)
        else:
            h = BETA * ((pi[0] - ref[0]).sum() - (pi[1] - ref[1]).sum())
            share = SMOOTHING if kind == "cdpo" else 0.0
            right, wrong = 1 / (1 + torch.exp(-h)), 1 / (1 + torch.exp(h))
            losses.append(-(1 - share) * torch.log(right) - share * torch.log(wrong))
        scored = token_logps(policy, chosen)[0 if kind == "orpo_prompt" else start :]
        of_better.append(-scored.sum())
        num_targets += len(scored)
    weight = {"dpo_sft": 0.4, "orpo": 1.0, "orpo_prompt": 1.0}.get(kind, 0.0)
    total: Tensor = sum(losses) / len(losses) + weight * sum(of_better) / num_targets  # type: ignore[assignment]
    return total


def total_loss(objective: Preference, model: Any, batches: Sequence[Batch]) -> Tensor:
    """As `train_step` computes it."""
    sums = [objective.loss_sums(model, batch, ALONE) for batch in batches]
    counts = [objective.num_targets(batch) for batch in batches]
    loss = torch.zeros(())
    for name, weight in objective.term_weights(0).items():
        loss = loss + weight * sum(own[name] for own in sums) / sum(own[name] for own in counts)
    return loss


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, Any]:
    """A policy and a reference of transformers, and the same two of distft."""
    folder = tmp_path_factory.mktemp("models")
    policy, reference = make_hf_model("llama"), make_hf_model("llama")
    with torch.no_grad():
        for param in reference.parameters():
            param.mul_(1.1)
    for name, model in (("policy", policy), ("reference", reference)):
        model.save_pretrained(folder / name)
    return policy, reference, *(load_from_hf(Path(folder / name))[1] for name in ("policy", "reference"))


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 2, 3, 4), (0, 3, 4)])
def test_loss_and_gradient_are_those_of_the_paper(
    models: tuple[Any, Any, Any, Any], kind: str, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy_module, "_CPU_CHUNK_NUMEL", 3 * VOCAB_SIZE)
    their_policy, their_reference, policy, reference = models
    objective = objective_of(**LOSSES[kind])
    values = None
    if objective.reference_target is not None:
        plain = feed_of(objective).batch(0, len(LENGTHS))
        with torch.no_grad():
            values = objective.reference_values(reference, plain, ALONE).view(-1, 2).tolist()
    feed = feed_of(objective, values)
    loss = total_loss(objective, policy, [feed.batch(*cut) for cut in pairwise(cuts)])
    expected = papers_losses(kind, their_policy, their_reference)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for model in (policy, their_policy):
        model.zero_grad()
    loss.backward()
    expected.backward()
    for ours, theirs in (
        (policy.lm_head.weight, their_policy.lm_head.weight),
        (policy.embed.weight, their_policy.model.embed_tokens.weight),
        (policy.norm.weight, their_policy.model.norm.weight),
    ):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_a_batch_without_pairs_has_no_loss_and_no_gradient(models: tuple[Any, Any, Any, Any]) -> None:
    policy = models[2]
    for settings in LOSSES.values():
        objective = objective_of(**settings)
        batch = feed_of(objective, [[-1.0, -2.0]] * len(LENGTHS)).batch(2, 2)
        assert set(objective.num_targets(batch).values()) == {0}
        policy.zero_grad()
        sums = objective.loss_sums(policy, batch, ALONE)
        torch.stack(list(sums.values())).sum().backward()
        assert all(value.item() == 0 for value in sums.values())
        assert all(param.grad is not None and not param.grad.any() for param in policy.parameters())
        assert not any(value.item() for value in objective.evaluate(policy, batch, ALONE).values())


def test_a_tie_is_half_right_and_margins_are_differences(models: tuple[Any, Any, Any, Any]) -> None:
    policy, objective = models[2], objective_of()
    with torch.no_grad():
        own = objective.reference_values(policy, feed_of(objective).batch(0, 4), ALONE).view(-1, 2)
    values = own - torch.tensor([[0.0, 0.0], [3.0, 1.0], [1.0, 2.0], [2.0, 0.0]])
    feed = feed_of(objective, values.tolist())
    metrics = objective.metrics(objective.evaluate(policy, feed.batch(0, 4), ALONE))
    assert metrics["accuracy"] == (0.5 + 1 + 0 + 1) / 4
    assert metrics["rewards/chosen"] == pytest.approx(BETA * 6 / 4, abs=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(BETA * 3 / 4, abs=1e-5)
    assert metrics["rewards/margin"] == pytest.approx(BETA * 3 / 4, abs=1e-5)
    assert metrics["log_probabilities/accuracy"] == float((own[:, 0] > own[:, 1]).double().mean())
    margins = [0, 2, -1, 2]
    expected = sum(math.log1p(math.exp(-BETA * margin)) for margin in margins) / 4
    assert metrics["loss"] == pytest.approx(expected, abs=1e-5)


@given(logp=st.one_of(st.floats(-100, 0), st.sampled_from([-0.0, -1e-30, -1e-9, -1e-4, -math.log(2), -80.0])))
def test_log_odds_are_exact_and_finite_with_finite_gradients(logp: float) -> None:
    value = torch.tensor([logp], requires_grad=True)
    odds = log_odds(value)
    x = min(float(value.detach().double()), -torch.finfo(torch.float32).eps)
    assert odds.item() == pytest.approx(x - math.log(-math.expm1(x)), rel=1e-6, abs=1e-6)
    other = torch.tensor([-1.0])
    for answers in (AnswerLogps(value, other), AnswerLogps(other, value), AnswerLogps(value, value)):
        (gradient,) = torch.autograd.grad(odds_ratio_losses(answers).sum(), value)
        assert torch.isfinite(gradient).all()


@given(
    num_rows=st.integers(0, 9),
    vocab_size=st.integers(1, 7),
    padding=st.integers(0, 2),
    softcap=st.sampled_from([None, 2.0]),
    frozen=st.sampled_from([None, 0, 1]),
    seed=st.integers(0, 100),
)
def test_log_probabilities_and_their_gradients_are_those_of_torch(
    num_rows: int, vocab_size: int, padding: int, softcap: float | None, frozen: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(size, 6, generator=generator) for size in (num_rows, vocab_size + padding)]
    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    factors = torch.randn(num_rows, generator=generator)

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = (hidden @ weight.T)[:, :vocab_size]
        capped = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return capped.log_softmax(1).gather(1, labels[:, None])[:, 0]

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return LogProbabilities(vocab_size)(hidden, weight, labels, softcap=softcap)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy_module, "_CPU_CHUNK_NUMEL", 20)
        for function in (ours, plain):
            own = [x.clone().requires_grad_(index != frozen) for index, x in enumerate(inputs)]
            logps = function(*own)
            (logps * factors).sum().backward()
            results.append([logps.detach(), *(x.grad for i, x in enumerate(own) if i != frozen)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing is of loss=dpo, and loss=ipo has none"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"loss": "orpo", "reference": "runs/base"}, "loss=orpo compares with no reference"),
        ({"loss": "orpo", "reference_dir": "shared"}, "no reference: leave reference_dir out"),
        ({"sft_on_prompt": True}, "sft_on_prompt needs the term sft"),
        ({"beta": 0}, "greater than 0"),
    ],
)
def test_settings_without_an_effect_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Preference(**settings)


def test_a_model_that_sees_both_directions_has_no_answers() -> None:
    with pytest.raises(ConfigError, match="every token sees the one that it has to predict"):
        Preference().check_model(TransformerConfig(**SIZES, attention="bidirectional"))


def test_counts_of_flops_know_the_share_of_positions_with_logits() -> None:
    feed = feed_of(objective_of())
    objective = objective_of().resolved(TransformerConfig(**SIZES), feed)
    answers = sum(a + b for _, a, b in LENGTHS)
    inputs = sum(2 * prompt + a + b - 2 for prompt, a, b in LENGTHS)
    assert objective.passes.logits_share == pytest.approx(answers / inputs)
    assert objective.num_targets(feed.batch(0, 4)) == {PREFERENCE: 4}
    with_sft = objective_of(loss="orpo")
    chosen = sum(a for _, a, _ in LENGTHS)
    assert with_sft.num_targets(feed_of(with_sft).batch(0, 4)) == {PREFERENCE: 4, SFT: chosen}
