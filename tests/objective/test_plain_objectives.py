"""Next-token prediction and classification: what they ask of a model, their refusals, and exact metrics."""

import math
from typing import Any

import pytest
import torch
from support.tiny_models import SIZES
from torch import Tensor

from distft.collectives import SingleProcess
from distft.data.batch import Batch
from distft.data.targets import IGNORE_INDEX, LABEL, NEXT_TOKEN
from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig
from distft.objective import cross_entropy as cross_entropy_module
from distft.objective.interface import ObjectiveContext
from distft.objective.settings import CausalLM, Classification

CONTEXT = ObjectiveContext(2, SingleProcess())
CAUSAL = TransformerConfig(**SIZES, attention="causal")
BIDIRECTIONAL = TransformerConfig(**SIZES, attention="bidirectional")
HIDDEN = torch.tensor([[1.0], [2.0], [3.0]])  # the model's last states, of which the third has no target
WEIGHT = torch.tensor([[0.0], [1.0], [5.0]])  # the third row is padding
TOKENS = Batch(
    input_ids=torch.zeros(1, 3, dtype=torch.int64),
    targets={NEXT_TOKEN: torch.tensor([[0, 1, IGNORE_INDEX]])},
    num_targets={NEXT_TOKEN: 2},
    num_target_bytes=5,
)
ROWS = Batch(
    input_ids=torch.zeros(3, 1, dtype=torch.int64),
    targets={LABEL: torch.tensor([0, 1, IGNORE_INDEX])},
    num_targets={LABEL: 2},
)


def token_model(*, heads: tuple[str, ...], losses_from_hidden: dict[str, Any], **inputs: Any) -> Any:
    assert heads == ("lm_head",)
    assert inputs["input_ids"] is TOKENS.input_ids
    return {"lm_head": losses_from_hidden["lm_head"](HIDDEN, WEIGHT)}


def row_model(*, heads: tuple[str, ...], **inputs: Any) -> dict[str, Tensor]:
    assert len(heads) == 1
    assert inputs["input_ids"] is ROWS.input_ids
    return {heads[0]: HIDDEN @ WEIGHT[:2].T}


def test_a_causal_model_is_required_for_next_tokens() -> None:
    CausalLM().check_model(CAUSAL)
    with pytest.raises(ConfigError) as caught:
        CausalLM().check_model(BIDIRECTIONAL)
    assert str(caught.value) == (
        "model.attention=bidirectional with objective.type=causal_lm: every token sees the one that it has "
        "to predict. Set model.attention=causal, or another objective."
    )


def test_the_first_token_of_a_causal_model_cannot_classify() -> None:
    for pooling in ("last", "mean"):
        Classification(pooling=pooling).check_model(CAUSAL)
    for pooling in ("first", "last", "mean"):
        Classification(pooling=pooling).check_model(BIDIRECTIONAL)
    with pytest.raises(ConfigError) as caught:
        Classification(pooling="first").check_model(CAUSAL)
    assert str(caught.value) == (
        "objective.pooling=first with model.attention=causal: the first token sees only itself, so the "
        "rest of the text has no effect. Set objective.pooling=last or mean."
    )


def test_data_of_the_other_kind_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError) as caught:
        Classification().heads(None)
    assert "objective.type=classification needs labels: set data.type=labelled, or label of" in str(
        caught.value
    )
    with pytest.raises(ConfigError) as caught:
        CausalLM().heads(("a", "b"))
    assert str(caught.value) == (
        "objective.type=causal_lm cannot learn labels: set objective.type=classification."
    )


def test_the_only_term_has_weight_one_in_every_step_and_its_number_of_targets() -> None:
    for step in (0, 7):
        assert CausalLM().term_weights(step) == {NEXT_TOKEN: 1.0}
        assert Classification().term_weights(step) == {LABEL: 1.0}
    assert CausalLM().num_targets(TOKENS) == {NEXT_TOKEN: 2}
    assert Classification().num_targets(ROWS) == {LABEL: 2}


def test_z_loss_and_smoothing_count_in_the_loss_of_next_tokens_and_not_in_its_evaluation() -> None:
    logits = (HIDDEN @ WEIGHT[:2].T)[:2].double()
    logsumexp = logits.logsumexp(1)
    plain = logsumexp[0] - logits[0, 0] + logsumexp[1] - logits[1, 1]
    smooth = 0.8 * plain + 0.2 * (logsumexp - logits.mean(1)).sum()
    objective = CausalLM(z_loss=0.1, label_smoothing=0.2)
    loss = objective.loss_sums(token_model, TOKENS, CONTEXT)[NEXT_TOKEN]
    assert loss.item() == pytest.approx((smooth + 0.1 * logsumexp.square().sum()).item(), rel=1e-6)
    sums = objective.evaluate(token_model, TOKENS, CONTEXT)
    assert sums["sums"].dtype == torch.float64
    assert sums["sums"].tolist() == pytest.approx([plain.item(), 1, 2, 5], rel=1e-6)


@pytest.mark.parametrize("compiles", [False, True])
def test_the_loss_is_compiled_if_the_model_is(monkeypatch: pytest.MonkeyPatch, compiles: bool) -> None:
    calls = 0

    def as_if_compiled(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return cross_entropy_module._loss_and_grad_in_two_passes(*arguments)

    monkeypatch.setattr(cross_entropy_module, "_compiled_loss_and_grad", lambda: as_if_compiled)
    context = ObjectiveContext(2, SingleProcess(), compiles=compiles)
    CausalLM().loss_sums(token_model, TOKENS, context)
    assert calls == compiles


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ([8.0, 3.0, 4.0, 2.0], {"loss": 2, "accuracy": 0.75, "bits_per_byte": 4 / math.log(2)}),
        ([2.0, 1.0, 1.0, 0.0], {"loss": 2, "accuracy": 1}),
        ([0.0, 0.0, 0.0, 0.0], {"loss": 0, "accuracy": 0}),
        ([1600.0, 0.0, 2.0, 0.0], {"loss": 800, "accuracy": 0}),
    ],
)
def test_metrics_of_tokens_follow_from_four_sums(sums: list[float], expected: dict[str, float]) -> None:
    expected = {**expected, "perplexity": math.exp(min(expected["loss"], 700))}  # a larger one overflows
    found = CausalLM().metrics({"sums": torch.tensor(sums, dtype=torch.float64)})
    assert found == pytest.approx(expected, rel=1e-12)


def test_metrics_of_rows_follow_from_the_counts_of_each_class() -> None:
    by_class = torch.tensor([[3, 2, 0], [4, 2, 0], [3, 3, 0]])  # correct, labelled, predicted
    sums = {"loss_sum": torch.tensor(12.0, dtype=torch.float64), "by_class": by_class}
    f1 = (6 / 7 + 4 / 5) / 2  # the third class does not occur
    assert Classification().metrics(sums) == pytest.approx({"loss": 2, "accuracy": 5 / 6, "macro_f1": f1})
    nothing = {"loss_sum": torch.zeros((), dtype=torch.float64), "by_class": torch.zeros_like(by_class)}
    assert Classification().metrics(nothing) == {"loss": 0, "accuracy": 0, "macro_f1": 0}


def test_rows_without_a_label_count_neither_in_the_loss_nor_in_its_evaluation() -> None:
    logits = (HIDDEN @ WEIGHT[:2].T).double()
    expected = (logits.logsumexp(1)[0] - logits[0, 0] + logits.logsumexp(1)[1] - logits[1, 1]).item()
    objective = Classification()
    assert objective.loss_sums(row_model, ROWS, CONTEXT)[LABEL].item() == pytest.approx(expected, rel=1e-6)
    found = objective.evaluate(row_model, ROWS, CONTEXT)
    assert found["loss_sum"].item() == pytest.approx(expected, rel=1e-6)
    assert found["loss_sum"].dtype == torch.float64
    assert found["by_class"].tolist() == [[0, 1], [1, 1], [0, 2]]
