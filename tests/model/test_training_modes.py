"""Ways to train the same model: recomputed activations, torch.compile, FP8, attention kernels."""

from collections import Counter
from typing import Any

import pytest
import torch
from support.tiny_models import SIZES, build
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from distft.errors import ConfigError
from distft.model.attention_kernels import require_attention_kernel, uses_flex_attention
from distft.model.compiler import compile_pays, missing_for_compile
from distft.model.fp8 import require_fp8, use_fp8
from distft.model.transformer_config import TransformerConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(5))


class _OperationCounter(TorchDispatchMode):
    """Counts the calls of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_selective_checkpointing_recomputes_no_product_and_no_attention() -> None:
    model = build(TransformerConfig(**SIZES)).train()
    counts = {}
    for mode in ("none", "selective", "full"):
        model.set_activation_checkpointing(mode)
        loss = model.logits(random_ids(2, 8)).square().sum()
        with _OperationCounter() as counter:
            loss.backward()
        counts[mode] = counter.counts
    attention = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    for operation in ("aten.mm.default", attention):
        assert counts["selective"][operation] == counts["none"][operation]
        assert counts["full"][operation] > counts["none"][operation]
    assert counts["selective"]["aten.silu.default"] == model.config.num_layers


def test_a_compiled_model_trains_as_an_eager_one_and_evaluates_without_compiling_again() -> None:
    counters.clear()
    losses, gradients = [], []
    for compiles in (False, True):
        model = build(TransformerConfig(**SIZES, dropout=0.1)).train()
        if compiles:
            model.compile_blocks()
        torch.manual_seed(0)
        loss = model.logits(random_ids(2, 8)).square().sum()
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([param.grad for param in model.parameters()])
    # One for all blocks, one for the final norm, one for the rotary angles.
    assert counters["stats"]["unique_graphs"] == 3
    with torch.no_grad():
        for num_rows in (3, 4, 5):
            model.logits(random_ids(num_rows, 8))
    # The two small ones once more without a gradient, for any shape; the blocks do not.
    assert counters["stats"]["unique_graphs"] <= 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(dropout: float) -> None:
    model = build(TransformerConfig(**SIZES, dropout=dropout)).train()
    gradients = []
    for recompute in ("none", "selective", "full"):
        model.set_activation_checkpointing(recompute)
        model.zero_grad()
        torch.manual_seed(0)
        model.logits(random_ids(2, 8)).square().sum().backward()
        gradients.append([param.grad for param in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise"])
def test_fp8_layers_keep_their_names_and_come_close_to_bf16(scaling: Any) -> None:
    sizes = {**SIZES, "d_model": 32, "d_ff": 64}
    plain = build(TransformerConfig(**sizes)).bfloat16()
    names = list(plain.state_dict())
    ids = random_ids(2, 16)
    expected = plain.logits(ids)
    use_fp8(plain.blocks, scaling, min_features=32, emulate=True)
    logits = plain.logits(ids)
    logits.square().sum().backward()
    assert list(plain.state_dict()) == names
    assert type(plain.blocks[0].mlp.up).__name__ == "Float8Linear"
    assert not torch.equal(logits, expected)
    # E4M3 has 3 bits of mantissa, so each factor is off by up to 1/16.
    assert (logits - expected).norm() < 0.25 * expected.norm()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in plain.parameters())


def test_fp8_leaves_layers_that_are_too_small_or_no_multiple_of_16() -> None:
    model = build(TransformerConfig(**{**SIZES, "d_model": 32, "d_ff": 24}))
    use_fp8(model.blocks, "tensorwise", min_features=32, emulate=True)
    converted = {name for name, module in model.named_modules() if "Float8" in type(module).__name__}
    assert converted == {f"blocks.{i}.attn.{name}" for i in range(len(model.blocks)) for name in "qkvo"}
    with pytest.raises(ConfigError, match=r"no linear layer has engine\.fp8_min_features=64 or more"):
        use_fp8(build(TransformerConfig(**SIZES)).blocks, "rowwise", min_features=64, emulate=True)


def test_fp8_names_the_package_that_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    require_fp8("tensorwise", CPU)
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"engine\.fp8=rowwise needs torchao.*install distft\[fp8\]"):
        require_fp8("rowwise", CPU)


def test_kernels_are_refused_where_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TransformerConfig(**SIZES, attention_kernel="flex")
    with pytest.raises(ConfigError, match=r"attention_kernel=flex needs a CUDA device"):
        require_attention_kernel(config, CPU)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"attention_kernel=flex needs (the package triton|a C compiler)"):
        require_attention_kernel(config, CUDA)
    assert missing_for_compile(CPU) == "a C++ compiler (g++, clang++, c++)"
    # Without a compiler packed rows fall back to SDPA, where they would go through flex attention.
    assert not uses_flex_attention(TransformerConfig(**SIZES, head_dim=16), CUDA)


def test_compiling_pays_for_long_runs_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_pays(CPU, 1e14)
    assert not compile_pays(CPU, 1e13)
    monkeypatch.setenv("PATH", "")
    assert not compile_pays(CPU, 1e14)


def test_the_cudnn_order_of_kernels_changes_no_result_where_cudnn_is_missing() -> None:
    ids = random_ids(2, 8)
    models = [build(TransformerConfig(**SIZES, attention_kernel=kernel)) for kernel in ("sdpa", "cudnn")]
    assert torch.equal(models[0].logits(ids), models[1].logits(ids))
