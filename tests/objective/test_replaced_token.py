"""ELECTRA's two losses: against a plain computation, on every engine, and its draws."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engine_scenarios import SEQ_LEN, VOCAB_SIZE, Scenario, Training, collectives_for
from support.mixtures import TokenRows, labelled_rows
from support.rank_pool import run_ranks
from support.tiny_models import build
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, log_softmax

from distft.collectives import SingleProcess
from distft.data.batch import Batch
from distft.data.dataset import DataContext
from distft.data.feed import Feed
from distft.data.targets import IGNORE_INDEX, MASKED_TOKEN, REPLACED_TOKEN, SAMPLING_KEY
from distft.errors import ConfigError
from distft.keyed_random import position_keys, row_keys, uniform
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import ObjectiveContext
from distft.objective.replaced_token import DISCRIMINATOR, GENERATOR, ReplacedToken
from distft.objective.token_sampling import gumbel_draws
from distft.topology import Topology
from distft.train.step import train_step

OBJECTIVE = ReplacedToken(mask_rate=0.3, generator_size=0.5, generator_layers=2)
SCENARIO = Scenario(attention="bidirectional", global_batch_size=7, max_grad_norm=None)
CONTEXT = DataContext(
    seq_len=SEQ_LEN,
    vocab_size=VOCAB_SIZE,
    encode=lambda _: [],
    tokenizer_fingerprint="",
    global_batch_size=7,
    unk_id=0,
)


def feed_of(rows: Any) -> Feed:
    feed = OBJECTIVE.transform_feed(Feed.for_training(rows, seed=5, shuffle=True), CONTEXT, seed=11)
    assert isinstance(feed, Feed)
    return feed


def plain_terms(model: Any, batch: Batch) -> tuple[Tensor, Tensor, int, int]:
    """Both sums and counts: a row at a time, without padding, from whole logits and a loop over positions."""
    generator_sum = discriminator_sum = torch.zeros(())
    num_masked = num_tokens = 0
    lengths = [SEQ_LEN] * len(batch.input_ids) if batch.lengths is None else batch.lengths.tolist()
    assert batch.sequence_numbers is not None
    for row, length in enumerate(lengths):
        ids, labels = batch.input_ids[row, :length], batch.targets[MASKED_TOKEN][row, :length]
        extra = {
            name: value[row : row + 1, :length]
            for name in ("position_ids", "document_ids")
            if (value := getattr(batch, name)) is not None
        }
        logits = model(ids[None], heads=("generator",), **extra)["generator"][0, :, :VOCAB_SIZE]
        original, filled = ids.clone(), ids.clone()
        for position in range(length):
            if labels[position] == IGNORE_INDEX:
                continue
            original[position] = labels[position]
            generator_sum = generator_sum - log_softmax(logits[position], 0)[labels[position]]
            key = position_keys(row_keys(11, batch.sequence_numbers[row : row + 1]), SEQ_LEN)[0, position]
            noise = -(-uniform(key[None], VOCAB_SIZE, 0x5241_4D50)[0].clamp_min(2.0**-54).log()).log()
            filled[position] = (logits[position].detach().double() + noise).argmax()
            num_masked += 1
        claims = model(filled[None], heads=("discriminator",), **extra)["discriminator"][0, :, 0]
        discriminator_sum = discriminator_sum + binary_cross_entropy_with_logits(
            claims, (filled != original).float(), reduction="sum"
        )
        num_tokens += length
    return generator_sum, discriminator_sum, num_masked, num_tokens


@pytest.mark.parametrize("rows", [TokenRows(), labelled_rows()], ids=["packed", "padded"])
@pytest.mark.parametrize("tied", [True, False])
def test_both_losses_and_gradients_equal_those_of_a_plain_computation(rows: Any, tied: bool) -> None:
    scenario = replace(SCENARIO, tie_embeddings=tied)
    model = build(scenario.model.model_copy(update={"init_std": 0.3}), OBJECTIVE.heads(None))
    batch = feed_of(rows).batch(3, 10)
    expected = plain_terms(model, batch)
    assert OBJECTIVE.num_targets(batch) == {GENERATOR: expected[2], DISCRIMINATOR: expected[3]}
    (expected[0] / expected[2] + expected[1] / expected[3]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    sums = OBJECTIVE.loss_sums(model, batch, ObjectiveContext(VOCAB_SIZE, SingleProcess()))
    torch.testing.assert_close(sums[GENERATOR], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums[DISCRIMINATOR], expected[1], rtol=1e-6, atol=1e-6)
    (sums[GENERATOR] / expected[2] + sums[DISCRIMINATOR] / expected[3]).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, gradients[name], rtol=1e-5, atol=1e-6)


def test_metrics_count_what_was_drawn_and_what_was_found() -> None:
    model = build(SCENARIO.model.model_copy(update={"init_std": 0.3}), OBJECTIVE.heads(None))
    batch, context = feed_of(labelled_rows()).batch(0, 9), ObjectiveContext(VOCAB_SIZE, SingleProcess())
    found = OBJECTIVE.metrics(OBJECTIVE.evaluate(model, batch, context))
    generator_sum, discriminator_sum, num_masked, num_tokens = plain_terms(model, batch)
    generator, discriminator = float(generator_sum.detach()), float(discriminator_sum.detach())
    assert found["generator/loss"] == pytest.approx(generator / num_masked, rel=1e-6)
    assert found["discriminator/loss"] == pytest.approx(discriminator / num_tokens, rel=1e-6)
    expected = generator / num_masked + 50 * discriminator / num_tokens
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert 0 < found["discriminator/replaced_share"] <= num_masked / num_tokens


class ReplacedTraining(Training):
    def train(self, to_step: int, rows: Any) -> list[float]:
        context = ObjectiveContext(VOCAB_SIZE, self.collectives)
        feed, losses = feed_of(rows), []
        while self.step < to_step:
            result = train_step(
                self.engine,
                [feed.batch(micro.start, micro.stop).for_step(4) for micro in self._micro_batches()],
                loss_sums=lambda model, batch: OBJECTIVE.loss_sums(model, batch, context),
                num_targets=OBJECTIVE.num_targets,
                weights=OBJECTIVE.term_weights(self.step),
                group_lr=lambda group: 3e-3 * group.lr_scale,
            )
            self.step += 1
            losses.append(float(result.loss))
        return losses


def train_all(topology: Topology, scenarios: list[Scenario]) -> list[tuple[list[float], dict[Any, Tensor]]]:
    results = []
    for scenario in scenarios:
        for rows in (TokenRows(), labelled_rows()):
            collectives = collectives_for(scenario, topology)
            training = ReplacedTraining(scenario, topology, collectives, heads=OBJECTIVE.heads(None))
            losses = training.train(1, rows)
            state = training.whole_state()
            gradients = {key[0]: values for key, values in state.items() if key[1] == "exp_avg"}
            results.append((losses + training.train(4, rows), gradients))
            training.engine.close()
    return results


@pytest.mark.ranks
@pytest.mark.parametrize(("world_size", "stages"), [(2, (0, 1, 2)), (4, (3,))])
def test_loss_and_gradient_are_those_of_one_rank(world_size: int, stages: tuple[int, ...]) -> None:
    """With dropout and cuts of 1 and 7 rows; moments are a tenth of the gradients."""
    base = replace(SCENARIO, dropout=0.2)
    expected = train_all(Topology(), [replace(base, micro_batch_size=7)])
    assert train_all(Topology(), [replace(base, micro_batch_size=1)])[0][0] == pytest.approx(
        expected[0][0], abs=2e-5
    )
    scenarios = [replace(base, stage=stage) for stage in stages]
    for results in run_ranks(train_all, world_size, scenarios, timeout_s=240):
        for index, (losses, gradients) in enumerate(results):
            plain_losses, plain_gradients = expected[index % 2]
            assert losses == pytest.approx(plain_losses, rel=1e-6)
            for name, values in plain_gradients.items():
                torch.testing.assert_close(gradients[name], values, rtol=1e-5, atol=1e-6, msg=name)


@given(st.integers(0, 2**40), st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_a_row_draws_the_same_in_every_cut(start: int, size: int) -> None:
    feed = feed_of(TokenRows())
    whole, part = feed.batch(start, start + 9), feed.batch(start + 9 - size, start + 9)
    for name in (MASKED_TOKEN, REPLACED_TOKEN, SAMPLING_KEY):
        assert torch.equal(whole.targets[name][-size:], part.targets[name])


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    hidden, weight = (
        torch.tensor([[1.0, 0.5]]),
        torch.tensor([[1.0, 0.0], [0.0, 3.0], [-1.0, 1.0], [0.0, 0.0]]),
    )
    num_draws = 40_000
    keys = row_keys(3, torch.arange(num_draws))
    counts = torch.bincount(gumbel_draws(hidden.expand(num_draws, 2), weight, keys), minlength=4)
    expected = (hidden @ weight.T).softmax(1)[0].double().numpy() * num_draws
    chi_squared = float((((counts.numpy() - expected) ** 2) / expected).sum())
    assert chi_squared < 16.27  # 3 degrees of freedom: exceeded once in 1,000 seeds
    assert gumbel_draws(hidden[:0], weight, keys[:0]).tolist() == []


def test_a_causal_model_and_text_without_a_mask_token_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective\.type=replaced_token"):
        OBJECTIVE.check_model(SCENARIO.model.model_copy(update={"attention": "causal"}))
    feed = Feed.for_training(TokenRows(), seed=5, shuffle=True)
    with pytest.raises(ConfigError, match="mask token"):
        OBJECTIVE.transform_feed(feed, replace(CONTEXT, unk_id=None), seed=1)


def test_the_generator_never_runs_the_models_own_blocks() -> None:
    model = build(TransformerConfig.model_validate(SCENARIO.model.model_dump()), OBJECTIVE.heads(None))
    model.blocks[0].register_forward_hook(lambda *_: pytest.fail("ran"))
    logits = model(torch.from_numpy(np.ones((1, 4), np.int64)), heads=("generator",))["generator"]
    assert logits.shape == (1, 4, VOCAB_SIZE)
