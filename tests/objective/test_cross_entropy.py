"""The chunked cross entropy against torch's own and the formulas written out."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from distft.data.targets import IGNORE_INDEX
from distft.objective import cross_entropy as module
from distft.objective.cross_entropy import FusedLinearCrossEntropy, LossAndNumCorrect


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_CPU_CHUNK_NUMEL", 40)  # a few rows at a time
        yield


def operands(num_rows: int, vocab_size: int, padding: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size + padding, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, vocab_size, (num_rows,), generator=generator)
    return hidden, weight, labels.where(labels >= 0, IGNORE_INDEX)


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, loss_fn: FusedLinearCrossEntropy) -> Tensor:
    logits = (hidden @ weight.T)[:, : loss_fn.vocab_size]
    loss = cross_entropy(
        logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=loss_fn.label_smoothing, reduction="sum"
    )
    z = logits.logsumexp(dim=1).square()
    return loss + loss_fn.z_loss * z[labels != IGNORE_INDEX].sum()


@given(
    num_rows=st.integers(0, 20),
    vocab_size=st.integers(1, 9),
    padding=st.integers(0, 3),
    z_loss=st.sampled_from([0.0, 0.1]),
    label_smoothing=st.sampled_from([0.0, 0.2]),
    grad_output=st.sampled_from([1.0, 0.03]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradients_equal_the_formulas(
    num_rows: int,
    vocab_size: int,
    padding: int,
    z_loss: float,
    label_smoothing: float,
    grad_output: float,
    seed: int,
) -> None:
    hidden, weight, labels = operands(num_rows, vocab_size, padding, seed)
    loss_fn = FusedLinearCrossEntropy(vocab_size, z_loss, label_smoothing)
    actual, expected = [], []
    for results, function, dtype in ((actual, loss_fn, torch.float32), (expected, reference, torch.float64)):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        loss = function(*inputs, labels, *([loss_fn] if function is reference else []))
        (loss * grad_output).backward()
        results += [loss.detach(), *(x.grad for x in inputs)]
    assert actual[0].dtype == torch.float32
    for value, reference_value in zip(actual, expected, strict=True):
        torch.testing.assert_close(value.double(), reference_value, rtol=1e-5, atol=3e-5)


def test_the_compiled_loss_equals_the_eager_one() -> None:
    results = []
    for compiles in (False, True):
        hidden, weight, labels = (x.float() if x.is_floating_point() else x for x in operands(20, 9, 2, 1))
        loss_fn = FusedLinearCrossEntropy(9, z_loss=0.1, label_smoothing=0.2, compiles=compiles)
        loss = loss_fn(hidden.requires_grad_(), weight.requires_grad_(), labels)
        loss.backward()
        results.append([loss.detach(), hidden.grad, weight.grad])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loss_is_close_to_the_exact_loss(dtype: torch.dtype) -> None:
    hidden, weight, labels = operands(64, 9, 1, 0)
    inputs = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    loss = FusedLinearCrossEntropy(9)(inputs[0], inputs[1], labels)
    loss.backward()
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = reference(doubles[0], doubles[1], labels, FusedLinearCrossEntropy(9))
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=3e-3)
    for low, high in zip(inputs, doubles, strict=True):
        assert low.grad is not None
        assert high.grad is not None
        assert low.grad.dtype == dtype
        assert (low.grad - high.grad).norm() < 0.02 * high.grad.norm()


def test_a_frozen_operand_gets_no_gradient() -> None:
    for frozen in (0, 1):
        hidden, weight, labels = operands(7, 5, 2, 1)
        inputs = [hidden.float(), weight.float()]
        inputs[1 - frozen].requires_grad_()
        FusedLinearCrossEntropy(5)(inputs[0], inputs[1], labels).backward()
        assert inputs[frozen].grad is None
        assert inputs[1 - frozen].grad is not None


@pytest.mark.parametrize("num_rows", [0, 5])
def test_rows_without_a_target_give_zero_loss_and_zero_gradients(num_rows: int) -> None:
    hidden, weight, _ = operands(num_rows, 5, 2, 1)
    inputs = [x.float().requires_grad_() for x in (hidden, weight)]
    labels = torch.full((num_rows,), IGNORE_INDEX)
    loss = FusedLinearCrossEntropy(5, 0.1, 0.1)(inputs[0], inputs[1], labels)
    loss.backward()
    assert loss.item() == 0
    assert all(x.grad is not None and not x.grad.any() for x in inputs)


@given(num_rows=st.integers(0, 20), padding=st.integers(0, 3), seed=st.integers(0, 1000))
def test_evaluation_sums_plain_loss_and_correct_predictions(num_rows: int, padding: int, seed: int) -> None:
    hidden, weight, labels = operands(num_rows, 7, padding, seed)
    loss_sum, num_correct = LossAndNumCorrect(7)(hidden.float(), weight.float(), labels).tolist()
    logits = (hidden @ weight.T)[:, :7]
    assert loss_sum == pytest.approx(
        reference(hidden, weight, labels, FusedLinearCrossEntropy(7)).item(), rel=1e-5, abs=1e-5
    )
    assert num_correct == (logits.argmax(dim=1) == labels).sum().item()
