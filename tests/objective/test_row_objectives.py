"""Several labels or a number per row: losses against torch, metrics against scikit-learn and SciPy."""

import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import SIZES, build
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, huber_loss, mse_loss

from distft.collectives import SingleProcess
from distft.data.batch import Batch, RaggedArray
from distft.data.labelled_rows import LabelledRows, RowTargets
from distft.data.targets import IGNORE_INDEX, LABEL, LABELS, NUMBER, ROW
from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig
from distft.objective.interface import ObjectiveContext
from distft.objective.settings import Classification, MultiLabel, Regression

NAMES = ("a", "b", "c")
CONTEXT = ObjectiveContext(61, SingleProcess())


def batch_of(targets: dict[str, Tensor], num_filler: int = 0) -> Batch:
    """Rows with these targets; the last `num_filler` of them stand for no row."""
    num_rows = len(next(iter(targets.values())))
    generator = torch.Generator().manual_seed(1)
    for values in targets.values():
        values[num_rows - num_filler :] = IGNORE_INDEX
    return Batch(
        input_ids=torch.randint(0, 61, (num_rows, 9), generator=generator),
        targets=targets,
        num_targets=dict.fromkeys(targets, num_rows - num_filler),
        lengths=torch.randint(1, 10, (num_rows,), generator=generator),
    )


def number_batch(num_rows: int, num_filler: int = 0) -> Batch:
    numbers = torch.arange(num_rows).float() * 1.5 - 2
    return batch_of({NUMBER: numbers, ROW: torch.zeros(num_rows, dtype=torch.int64)}, num_filler)


def label_batch(num_rows: int, num_filler: int = 0) -> Batch:
    labels = torch.randint(0, 2, (num_rows, 3), generator=torch.Generator().manual_seed(2))
    return batch_of({LABELS: labels}, num_filler)


@pytest.mark.parametrize("num_filler", [0, 2])
def test_the_multi_label_loss_is_binary_cross_entropy_over_rows_and_classes(num_filler: int) -> None:
    objective = MultiLabel(pooling="mean")
    model, batch = build(TransformerConfig(**SIZES), objective.heads(NAMES)), label_batch(6, num_filler)
    (loss,) = objective.loss_sums(model, batch, CONTEXT).values()
    logits = model(**batch.model_inputs)["classifier"]
    labels = batch.targets[LABELS][: 6 - num_filler].float()
    expected = binary_cross_entropy_with_logits(logits[: 6 - num_filler], labels).detach()
    torch.testing.assert_close(
        loss.detach() / objective.num_targets(batch)[LABELS], expected, rtol=0, atol=1e-6
    )
    assert objective.metrics(objective.evaluate(model, batch, CONTEXT))["loss"] == pytest.approx(
        expected.item()
    )


@given(st.lists(st.tuples(*[st.booleans()] * 6), min_size=1, max_size=12))
def test_multi_label_metrics_equal_those_of_scikit_learn(rows: list[tuple[bool, ...]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score

    values = torch.tensor(rows)
    labels, predicted = values[:, :3], values[:, 3:]

    def model(**_: object) -> dict[str, Tensor]:
        return {"classifier": torch.where(predicted, 1.0, -1.0)}

    objective = MultiLabel()
    batch = batch_of({LABELS: labels.long()})
    found = objective.metrics(objective.evaluate(model, batch, CONTEXT))
    truth = (labels.numpy(), predicted.numpy())
    assert found["exact_match"] == pytest.approx(accuracy_score(*truth))
    assert found["micro_f1"] == pytest.approx(f1_score(*truth, average="micro", zero_division=0))
    if values.any():
        expected = f1_score(*truth, average="macro", zero_division=np.nan)
        assert found["macro_f1"] == pytest.approx(expected)


@pytest.mark.parametrize("num_filler", [0, 2])
@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_the_regression_loss_is_that_of_torch_on_scaled_numbers(loss: Any, num_filler: int) -> None:
    objective = Regression(loss=loss, huber_delta=0.7, offset=2.0, scale=3.0, pooling="mean")
    model, batch = build(TransformerConfig(**SIZES), objective.heads(None)), number_batch(6, num_filler)
    (found,) = objective.loss_sums(model, batch, CONTEXT).values()
    kept = 6 - num_filler
    outputs, scaled = (
        model(**batch.model_inputs)["classifier"][:kept, 0],
        (batch.targets[NUMBER][:kept] - 2) / 3,
    )
    expected = mse_loss(outputs, scaled) if loss == "squared" else huber_loss(outputs, scaled, delta=0.7)
    torch.testing.assert_close(found / objective.num_targets(batch)[NUMBER], expected, rtol=0, atol=1e-6)


def test_a_number_may_be_the_value_that_marks_no_label() -> None:
    """-100: which rows count is a target of its own."""
    objective = Regression()
    batch = batch_of({NUMBER: torch.tensor([-100.0, 3.0]), ROW: torch.zeros(2, dtype=torch.int64)})
    model = lambda **_: {"classifier": torch.tensor([[-99.0], [2.0]])}  # noqa: E731
    assert float(objective.loss_sums(model, batch, CONTEXT)[NUMBER]) == 2.0
    assert len(objective.evaluate(model, batch, CONTEXT)["numbers"]) == 2


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=20))
def test_regression_metrics_equal_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import pearsonr, spearmanr

    predictions, numbers = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    sums = {"loss_sum": torch.tensor(1.0), "predictions": predictions, "numbers": numbers}
    found = Regression().metrics(sums)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant input
        for name, oracle in (("pearson", pearsonr), ("spearman", spearmanr)):
            expected = float(oracle(predictions, numbers)[0])
            assert found[name] == pytest.approx(0.0 if math.isnan(expected) else expected, abs=1e-9)
    assert found["mean_absolute_error"] == pytest.approx(float((predictions - numbers).abs().mean()))


@pytest.mark.parametrize("objective", [MultiLabel(), Regression()])
def test_sums_do_not_depend_on_how_a_batch_is_cut(objective: Any) -> None:
    model = build(TransformerConfig(**SIZES), objective.heads(NAMES))
    batch = label_batch(5, 1) if isinstance(objective, MultiLabel) else number_batch(5, 1)
    cuts = [
        replace(
            batch,
            input_ids=batch.input_ids[rows],
            lengths=batch.lengths[rows],
            targets={name: values[rows] for name, values in batch.targets.items()},
        )
        for rows in (slice(0, 2), slice(2, 5))
    ]
    for name, whole in objective.evaluate(model, batch, CONTEXT).items():
        parts = [objective.evaluate(model, cut, CONTEXT)[name] for cut in cuts]
        merged = torch.cat(parts) if name in objective.per_row else sum(parts)
        torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)
    (loss,) = objective.loss_sums(model, batch, CONTEXT).values()
    cut_losses = [next(iter(objective.loss_sums(model, cut, CONTEXT).values())) for cut in cuts]
    torch.testing.assert_close(sum(cut_losses), loss)


def test_several_labels_need_labelled_data() -> None:
    with pytest.raises(ConfigError, match="labels=several"):
        MultiLabel().heads(None)


def test_numbers_that_differ_in_their_last_digits_give_different_losses() -> None:
    """Seconds since 1970, as labels: float32 rounds them to multiples of 128."""
    objective = Regression(offset=1_700_000_012, scale=7)
    rows = LabelledRows(
        RaggedArray([[1], [2]]),
        RowTargets(NUMBER, np.array([1_700_000_005.0, 1_700_000_019.0]).view(np.int64)),
    )
    model = lambda **_: {"classifier": torch.tensor([[-1.0], [1.0]])}  # noqa: E731
    batch = rows.batch(np.arange(2))
    assert float(objective.loss_sums(model, batch, CONTEXT)[NUMBER]) == 0.0
    assert objective.metrics(objective.evaluate(model, batch, CONTEXT))["mean_absolute_error"] == 0.0


def test_a_row_without_a_number_adds_no_gradient_however_small_the_scale() -> None:
    outputs = torch.zeros(2, 1, requires_grad=True)
    numbers = torch.tensor([1e30, 0.0], dtype=torch.float64)
    batch = batch_of({NUMBER: numbers, ROW: torch.zeros(2, dtype=torch.int64)}, num_filler=1)
    objective = Regression(offset=1e30, scale=1e-30)
    objective.loss_sums(lambda **_: {"classifier": outputs}, batch, CONTEXT)[NUMBER].backward()
    assert outputs.grad is not None
    assert outputs.grad.tolist() == [[0.0], [0.0]]


def test_sums_of_a_classification_grow_with_the_classes_and_not_with_their_square() -> None:
    num_classes = 100_000
    logits = torch.zeros(2, num_classes)
    logits[:, 7] = 1
    batch = batch_of({LABEL: torch.tensor([7, 99_999])})
    sums = Classification().evaluate(lambda **_: {"classifier": logits}, batch, CONTEXT)
    assert max(value.numel() for value in sums.values()) == 3 * num_classes
    assert Classification().metrics(sums)["accuracy"] == 0.5


def test_an_objective_counts_its_own_targets_alone() -> None:
    with pytest.raises(KeyError, match=LABEL):
        Classification().num_targets(number_batch(3))
    assert Regression().num_targets(number_batch(3)) == {NUMBER: 3}
