"""Matrices in 8 and 4 bits: to the nearest value, and products as of the rounded matrix."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from distft.model.quantized import NF4_BLOCK, QuantizedMatrix, quantized_product

CPU = torch.device("cpu")
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 40))


def _values(shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * torch.rand(shape[0], 1, generator=generator).exp2()


def _quantized(values: torch.Tensor, bits: int) -> QuantizedMatrix:
    matrix = QuantizedMatrix(values.shape, bits, CPU)
    matrix.set(values)
    return matrix


@hypothesis.given(SHAPES, st.integers(0, 99))
def test_8_bits_are_within_half_a_step_of_a_row(shape: tuple[int, int], seed: int) -> None:
    values = _values(shape, seed)
    steps = values.abs().amax(1, keepdim=True) / 127
    assert ((_quantized(values, 8).whole(torch.float32) - values).abs() <= steps * 0.5001).all()


@hypothesis.given(SHAPES, st.integers(0, 99))
def test_4_bits_are_the_nearest_of_16_values(shape: tuple[int, int], seed: int) -> None:
    values = _values(shape, seed)
    found = _quantized(values, 4).whole(torch.float32)
    assert found.shape == values.shape
    ones = torch.linspace(-1, 1, 4001).view(1, -1)  # has 1 in each block, so that codes are values
    ones[0, ::NF4_BLOCK] = 1
    table = _quantized(ones, 4).whole(torch.float32).unique()
    assert len(table) == 16
    for found_block, block in zip(
        found.flatten().split(NF4_BLOCK), values.flatten().split(NF4_BLOCK), strict=True
    ):
        scale = block.abs().max()
        nearest = (block[:, None] / scale - table).abs().amin(1)
        torch.testing.assert_close((block - found_block).abs() / scale, nearest, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_and_its_gradient_are_those_of_the_rounded_matrix(bits: int, dtype: torch.dtype) -> None:
    matrix = _quantized(_values((7, 33), 1), bits)
    x = _values((5, 33), 2).to(dtype).requires_grad_()
    again = x.detach().clone().requires_grad_()
    y = quantized_product(x, matrix)
    expected = torch.nn.functional.linear(again, matrix.whole(dtype))
    torch.testing.assert_close(y, expected, atol=0, rtol=0)
    (y * torch.arange(7)).sum().backward()
    (expected * torch.arange(7)).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, atol=0, rtol=0)


def test_autograd_saves_no_matrix_in_full_precision() -> None:
    saved = []
    matrix = _quantized(_values((40, 50), 1), 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        quantized_product(torch.ones(2, 50, requires_grad=True), matrix)
    assert sum(saved) == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_stay_zeros(bits: int) -> None:
    values = torch.zeros(3, 70)
    values[2, 1] = 1e-30
    assert torch.equal(_quantized(values, bits).whole(torch.float32)[:2], values[:2])
