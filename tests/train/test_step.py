"""The step, run by a fake engine: its arithmetic, without a model or a backend."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distft.data.batch import Batch
from distft.engine.interface import GroupLr, LossTermsFn, UpdateResult
from distft.optim.groups import ParameterGroup
from distft.optim.settings import UpdateRule
from distft.train.step import StepResult, train_step
from distft.train.transfers import to_device

RULE = UpdateRule(())
GROUPS = (ParameterGroup(("a",), 0.0, 1.0, 0, RULE), ParameterGroup(("b",), 0.0, 0.5, 0, RULE))


class FakeEngine:
    """Adds up terms; records in which order it was called, and with which rates."""

    device = torch.device("cpu")

    def __init__(self, *, reverse: bool = False) -> None:
        self.reverse = reverse
        self.calls: list[str] = []
        self.lrs: list[float] = []

    def forward_backward(self, micro_batches: Sequence[Batch], loss_terms: LossTermsFn) -> Tensor:
        self.calls.append(f"forward_backward of {len(micro_batches)}")
        order = reversed(micro_batches) if self.reverse else micro_batches
        return torch.stack([loss_terms(lambda **_: {}, batch) for batch in order]).sum(0)

    def step(self, group_lr: GroupLr) -> UpdateResult:
        self.calls.append("step")
        self.lrs = [group_lr(group) for group in GROUPS]
        return UpdateResult(torch.tensor(1.0), torch.tensor(0.0))

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        return value.clone()


def batch_of(values: Any, num_pairs: int = 0) -> Batch:
    numbers = torch.as_tensor(values, dtype=torch.float64)
    return Batch(input_ids=numbers, targets={}, num_targets={"squares": len(numbers), "pairs": num_pairs})


def sums(_: Any, batch: Batch) -> Mapping[str, Tensor]:
    return {
        "squares": batch.input_ids.square().sum(),
        "pairs": 10.0 * torch.tensor(batch.num_targets["pairs"]),
    }


def step(engine: Any, batches: Sequence[Batch], weights: Mapping[str, float], **options: Any) -> StepResult:
    return train_step(
        engine,
        batches,
        loss_sums=sums,
        num_targets=lambda batch: batch.num_targets,
        weights=weights,
        group_lr=lambda group: 0.1 * group.lr_scale,
        **options,
    )


@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 6])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_loss_does_not_depend_on_how_the_batch_is_cut_or_ordered(
    num_micro_batches: int, reverse: bool
) -> None:
    values = np.arange(13.0)
    engine = FakeEngine(reverse=reverse)
    cut = [batch_of(part) for part in np.array_split(values, num_micro_batches)]
    result = step(engine, cut, {"squares": 1.0})
    assert result.loss.item() == pytest.approx((values**2).mean())
    assert result.num_targets.tolist() == [13]
    assert engine.calls == [f"forward_backward of {num_micro_batches}", "step"]


def test_each_term_is_divided_by_its_own_count_and_weighted() -> None:
    batches = [batch_of([1.0, 2.0], num_pairs=3), batch_of([3.0], num_pairs=1)]
    result = step(FakeEngine(), batches, {"squares": 0.5, "pairs": 2.0})
    assert result.terms.tolist() == pytest.approx([14 / 3, 10.0])
    assert result.loss.item() == pytest.approx(0.5 * 14 / 3 + 2.0 * 10.0)
    assert result.num_targets.tolist() == [3, 4]


def test_a_term_of_weight_0_has_no_value_and_makes_no_other_infinite() -> None:
    batches = [batch_of([2.0], num_pairs=1)]
    result = step(FakeEngine(), batches, {"squares": 0.0, "pairs": 1.0})
    assert result.loss.item() == 10.0
    assert result.terms.tolist() == [0.0, 10.0]
    assert result.is_measured.tolist() == [False, True]
    assert step(FakeEngine(), [batch_of([2.0])], {"squares": 1.0, "pairs": 1.0}).is_measured.tolist() == [
        True,
        False,
    ]


def test_a_term_without_targets_adds_nothing_while_another_has_some() -> None:
    result = step(FakeEngine(), [batch_of([2.0])], {"squares": 1.0, "pairs": 1.0})
    assert result.loss.item() == 4.0


def test_a_batch_without_any_target_has_no_finite_loss_so_that_engines_skip_it() -> None:
    result = step(FakeEngine(), [batch_of([])], {"squares": 1.0, "pairs": 1.0})
    assert not result.loss.isfinite()
    assert result.num_targets.sum().item() == 0


def test_a_micro_batch_that_does_not_name_a_term_has_no_targets_of_it() -> None:
    unnamed = Batch(input_ids=torch.tensor([1.0]), targets={}, num_targets={"squares": 1})
    result = train_step(
        FakeEngine(),
        [unnamed, batch_of([2.0], num_pairs=1)],
        loss_sums=lambda _, batch: {"squares": batch.input_ids.sum(), "pairs": batch.input_ids.sum()},
        num_targets=lambda batch: batch.num_targets,
        weights={"squares": 1.0, "pairs": 1.0},
        group_lr=lambda _: 0.1,
    )
    assert result.num_targets.tolist() == [2, 1]


def test_the_objective_gets_the_engines_model_and_the_result_has_what_the_update_said() -> None:
    engine: Any = FakeEngine()
    models = []

    def forward(_: Sequence[Batch], loss_terms: LossTermsFn) -> Tensor:
        return loss_terms(forward, batch_of([1.0]))

    def squares_of(model: Any, _: Batch) -> Mapping[str, Tensor]:
        models.append(model)
        return {"squares": torch.ones(())}

    engine.forward_backward = forward
    engine.step = lambda _: UpdateResult(torch.tensor(3.0), torch.tensor(1.0))
    result = train_step(
        engine,
        [batch_of([1.0])],
        loss_sums=squares_of,
        num_targets=lambda batch: batch.num_targets,
        weights={"squares": 1.0},
        group_lr=lambda _: 0.1,
    )
    assert models == [forward]
    assert (result.grad_norm.item(), result.is_skipped.item()) == (3.0, 1.0)


def test_rates_are_asked_for_each_group() -> None:
    engine = FakeEngine()
    step(engine, [batch_of([1.0])], {"squares": 1.0})
    assert engine.lrs == [0.1, 0.05]


def test_sums_for_metrics_are_added_over_micro_batches_and_take_no_part_in_the_loss() -> None:
    def count(batch: Batch) -> Mapping[str, Tensor]:
        return {"large": (batch.input_ids > 1).sum()} if len(batch.input_ids) > 1 else {}

    batches = [batch_of([1.0, 2.0, 3.0]), batch_of([9.0]), batch_of([4.0, 0.0])]
    result = step(FakeEngine(), batches, {"squares": 1.0}, training_sums=count, sum_names=["large", "none"])
    assert result.sums.tolist() == [3, 0]
    assert result.loss.item() == step(FakeEngine(), batches, {"squares": 1.0}).loss.item()


def test_tokens_are_counted_without_padding_and_rows_that_stand_for_none() -> None:
    padded = replace(batch_of([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), lengths=torch.tensor([2, 1]))
    batches = [padded, padded.without_targets(), batch_of([[1.0, 2.0]])]
    sums_of = {"loss_sums": lambda _, batch: {"squares": batch.input_ids.sum()}}
    result = train_step(
        FakeEngine(),
        [batch.for_step(None) for batch in batches],
        **sums_of,
        num_targets=lambda batch: batch.num_targets,
        weights={"squares": 1.0},
        group_lr=lambda _: 0.1,
    )
    assert int(result.num_tokens) == 2 + 1 + 2


def test_signals_come_back_summed_beside_the_counts() -> None:
    result = step(FakeEngine(), [batch_of([1.0])], {"squares": 1.0}, signals=[0, 1, 0, 1])
    assert result.signals.get() == [0, 1, 0, 1]


def test_a_save_may_hold_the_update_but_not_the_backward() -> None:
    engine = FakeEngine()
    step(engine, [batch_of([1.0])], {"squares": 1.0}, before_update=lambda: engine.calls.append("hold"))
    assert engine.calls == ["forward_backward of 1", "hold", "step"]


def test_signals_are_on_their_way_to_the_host_before_the_forward() -> None:
    """Else the host would hear them only when the device has completed the step, and leave it idle."""
    engine = FakeEngine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distft.train.step.DeferredRead", lambda value: engine.calls.append("read") or value)
        step(engine, [batch_of([1.0])], {"squares": 1.0}, signals=[1])
    assert engine.calls == ["read", "forward_backward of 1", "step"]


@pytest.mark.parametrize(
    ("numbers", "dtype"), [([1, 2], torch.int64), ([0.5, 2], torch.float32), ([], torch.float32)]
)
def test_numbers_keep_their_kind_on_the_device(numbers: list[float], dtype: torch.dtype) -> None:
    moved = to_device(numbers, torch.device("cpu"))
    assert moved.dtype == dtype
    assert moved.tolist() == numbers
