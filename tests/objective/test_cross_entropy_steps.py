"""Parts of the chunked cross entropy: its form for a compiler, its chunks, the sum of their products."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distft.data.targets import IGNORE_INDEX
from distft.objective import cross_entropy as module


@given(
    vocab_size=st.integers(1, 6),
    padding=st.integers(0, 2),
    z_loss=st.sampled_from([0.0, 0.1]),
    smoothing=st.sampled_from([0.0, 0.2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_the_form_for_a_compiler_computes_what_the_eager_form_does(
    vocab_size: int, padding: int, z_loss: float, smoothing: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, vocab_size + padding, generator=generator).to(dtype)
    logits[:, vocab_size:] = -torch.inf
    labels = torch.randint(-1, vocab_size, (5,), generator=generator)
    labels = labels.where(labels >= 0, IGNORE_INDEX)
    eager = module._loss_and_grad(logits.clone(), labels, vocab_size, z_loss, smoothing)
    compiled = module._loss_and_grad_in_two_passes(logits.clone(), labels, vocab_size, z_loss, smoothing)
    counts = eager[2].bool()
    assert [value.dtype for value in compiled] == [value.dtype for value in eager]
    assert [value.dtype for value in eager] == [torch.float32, dtype, dtype]
    assert torch.equal(counts, labels != IGNORE_INDEX)
    assert torch.equal(compiled[2], eager[2])
    torch.testing.assert_close(compiled[0], eager[0], rtol=1e-5, atol=1e-5)
    rounding = 1e-5 if dtype == torch.float32 else 2**-7  # of neighbours in bf16
    torch.testing.assert_close(compiled[1][counts], eager[1][counts], rtol=rounding, atol=1e-6)


def rows_per_chunk(device: str, num_rows: int, vocab_size: int) -> list[int]:
    hidden = torch.empty(num_rows, 1, device=device)
    chunks = module._row_chunks(hidden, vocab_size)
    assert [row for rows in chunks for row in range(num_rows)[rows]] == list(range(num_rows))
    return [rows.stop - rows.start for rows in chunks]


def test_a_chunk_has_as_many_rows_as_its_logits_have_room() -> None:
    assert rows_per_chunk("cpu", 1000, 2**14) == [256] * 3 + [232]
    assert rows_per_chunk("cpu", 3, 2**22) == rows_per_chunk("cpu", 3, 2**23) == [1, 1, 1]
    # Elsewhere a power of two, at least half of what there is room for.
    assert rows_per_chunk("meta", 5000, 50_304) == [2048, 2048, 904]
    assert rows_per_chunk("meta", 3000, 2**17) == [1024, 1024, 952]
    assert rows_per_chunk("meta", 3, 2**26) == [2, 1]
    assert rows_per_chunk("meta", 2, 2**27) == rows_per_chunk("meta", 2, 2**28) == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_add_up_in_the_dtype_of_the_sum(dtype: torch.dtype) -> None:
    left, right = (torch.randint(-3, 4, shape).to(dtype) for shape in ((4, 5), (5, 6)))
    start = torch.randint(-9, 10, (4, 6)).float()
    total = start.clone()
    module._add_matmul(total, left, right)
    assert total.dtype == torch.float32
    assert torch.equal(total, start + left.float() @ right.float())  # small whole numbers: exact


def test_fp16_losses_of_many_rows_are_summed_in_fp32() -> None:
    """A sum of 70,000 would not fit into fp16."""
    hidden, weight = torch.full((6000, 1), 10.0), torch.tensor([[0.0], [1.2]])
    labels = torch.zeros(6000, dtype=torch.int64)
    loss = module.FusedLinearCrossEntropy(2)(hidden.half(), weight.half(), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(72_000, rel=1e-3)


def test_evaluation_counts_a_token_of_the_padding_never_as_predicted_and_keeps_no_graph() -> None:
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [2.0], [9.0]], requires_grad=True)  # the last row is padding
    sums = module.LossAndNumCorrect(2)(hidden, weight, torch.tensor([1, IGNORE_INDEX]))
    assert not sums.requires_grad
    assert sums.dtype == torch.float64
    assert sums.tolist() == pytest.approx([torch.tensor([1.0, 2.0]).logsumexp(0).item() - 2.0, 1.0], rel=1e-6)


def test_the_weights_gradient_is_summed_in_fp32_over_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 a sum of halves stands still at 128."""
    monkeypatch.setattr(module, "_CPU_CHUNK_NUMEL", 2)  # a row at a time
    hidden, weight = torch.ones(1024, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    labels = torch.zeros(1024, dtype=torch.int64)
    module.FusedLinearCrossEntropy(2)(hidden, weight.requires_grad_(), labels).backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [[-512.0], [512.0]]


@pytest.mark.parametrize("frozen", [0, 1])
def test_nothing_is_computed_for_a_frozen_operand(frozen: int) -> None:
    operands = [torch.ones(3, 2), torch.ones(4, 2)]
    operands[1 - frozen].requires_grad_()
    loss = module.FusedLinearCrossEntropy(4)(operands[0], operands[1], torch.zeros(3, dtype=torch.int64))
    saved: tuple[torch.Tensor | None, ...] = loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [value is None for value in saved] == [frozen == 0, frozen == 1]


@pytest.mark.parametrize("compiles", [False, True])
def test_all_of_it_is_computed_on_the_operands_device_in_the_form_that_was_chosen(
    monkeypatch: pytest.MonkeyPatch, compiles: bool
) -> None:
    calls: list[str] = []

    def as_if_compiled(*arguments: Any) -> Any:
        calls.append("compiled form")
        return module._loss_and_grad_in_two_passes(*arguments)

    def one_chunk(hidden: torch.Tensor, vocab_size: int) -> list[slice]:
        calls.append(f"chunks for {vocab_size} columns")
        return [slice(0, len(hidden))]

    monkeypatch.setattr(module, "_compiled_loss_and_grad", lambda: as_if_compiled)
    monkeypatch.setattr(module, "_row_chunks", one_chunk)
    hidden, weight = (torch.ones(size, 2, device="meta", requires_grad=True) for size in (3, 7))
    labels = torch.zeros(3, dtype=torch.int64, device="meta")
    loss = module.FusedLinearCrossEntropy(5, 0.1, 0.1, compiles)(hidden, weight, labels)
    loss.backward()
    assert loss.is_meta
    assert all(value.grad is not None and value.grad.is_meta for value in (hidden, weight))
    assert calls == ["chunks for 7 columns", *["compiled form"] * compiles]  # padding included
