"""Optimizers over segments of flat buffers, with torch's own as oracles."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distft.config import parse
from distft.optim.config import OptimConfig
from distft.optim.groups import parameter_groups
from distft.optim.kernels import set_clip_and_skip
from distft.optim.segments import MasterSlice, SegmentedOptimizer
from distft.optim.settings import OptimizerSettings

SHAPES = {"blocks.0.norm.weight": (5,), "blocks.0.a.weight": (6, 9), "blocks.1.b.weight": (11, 4)}


def _in_one_buffer(raw: dict[str, Any]) -> tuple[SegmentedOptimizer, nn.Parameter, dict[str, Tensor]]:
    """An optimizer over one buffer with all parameters, and views of each in it."""
    optim: OptimizerSettings = parse(OptimConfig, {"weight_decay": 0.1, **raw})
    generator = torch.Generator().manual_seed(0)
    sizes = [torch.Size(shape).numel() for shape in SHAPES.values()]
    flat = nn.Parameter(torch.randn(sum(sizes) + 3, generator=generator))  # 3 of padding
    views = dict(zip(SHAPES, torch.split(flat.detach()[:-3], sizes), strict=True))
    slices = [
        MasterSlice(name, SHAPES[name], 0, flat, int(view.storage_offset()), view.numel())
        for name, view in views.items()
    ]
    optimizer = SegmentedOptimizer(slices, parameter_groups(SHAPES, SHAPES, optim, {}), optim)
    return optimizer, flat, views


@pytest.mark.parametrize("scale", ["adamw", "spectral"])
def test_muon_is_that_of_torch_for_matrices(scale: str) -> None:
    optimizer, flat, views = _in_one_buffer({"type": "muon", "update_scale": scale})
    params = {name: nn.Parameter(view.view(SHAPES[name]).clone()) for name, view in views.items()}
    matrices = [param for param in params.values() if param.ndim == 2]
    adjust = {"adamw": "match_rms_adamw", "spectral": "original"}[scale]
    plain = torch.optim.Muon(matrices, lr=0.02, adjust_lr_fn=adjust)
    optimizer.set_lr(lambda _: 0.02)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        flat.grad = torch.randn(flat.shape, generator=generator)
        for name, param in params.items():
            begin = views[name].storage_offset()
            param.grad = flat.grad[begin : begin + param.numel()].view_as(param).clone()
        optimizer.update([flat])
        plain.step()  # type: ignore[no-untyped-call]
    for name, param in params.items():
        if param.ndim == 2:
            torch.testing.assert_close(views[name].view_as(param), param.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "raw", [{}, {"type": "lion"}, {"type": "sgd"}, {"type": "sgd", "momentum": 0.0}, {"type": "muon"}]
)
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_a_skipped_update_changes_nothing(raw: dict[str, Any], bad: float) -> None:
    optimizer, flat, _ = _in_one_buffer(raw)
    optimizer.set_lr(lambda _: 0.1)

    def update(gradient: Tensor) -> None:
        flat.grad = gradient
        norm = gradient.norm()
        set_clip_and_skip(optimizer.kernel, norm, loss_scale=torch.tensor(8.0), max_grad_norm=1.0)
        optimizer.update([flat])

    def state() -> list[Tensor]:
        found = [flat.detach().clone()]
        for _, moments, step in optimizer.states():
            found += [step.clone(), *(values.clone() for values in moments.values())]
        return found

    update(torch.linspace(-1, 1, flat.numel()))
    before = state()
    poisoned = torch.linspace(-1, 1, flat.numel())
    poisoned[7] = bad
    update(poisoned)
    assert all(torch.equal(one, other) for one, other in zip(before, state(), strict=True))
    update(torch.linspace(-1, 1, flat.numel()))
    assert not torch.equal(before[0], flat)
    assert {int(step) for _, _, step in optimizer.states()} == {2}


def test_each_matrix_of_muon_has_its_own_segment_and_others_share_them() -> None:
    muon, _, _ = _in_one_buffer({"type": "muon"})
    adamw, _, _ = _in_one_buffer({"weight_decays": {"*": 0.1}})
    assert len(muon.kernel.state) == 3
    assert len(adamw.kernel.state) == 1
