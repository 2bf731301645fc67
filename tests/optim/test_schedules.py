import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from distft.config import parse
from distft.errors import ConfigError
from distft.optim.adamw import AdamWConfig
from distft.optim.schedules import (
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    RangeConfig,
    ScheduleConfig,
    WarmupStableDecayConfig,
)

STEPS = st.integers(1, 400)
FACTORS = st.floats(0, 1)


def schedules(warmup_steps: int, final_factor: float, decay_steps: int = 1) -> list[ScheduleConfig]:
    return [
        CosineConfig(warmup_steps=warmup_steps, final_factor=final_factor),
        LinearConfig(warmup_steps=warmup_steps, final_factor=final_factor),
        WarmupStableDecayConfig(
            warmup_steps=warmup_steps, decay_steps=decay_steps, final_factor=final_factor
        ),
        WarmupStableDecayConfig(
            warmup_steps=warmup_steps, decay_steps=decay_steps, decay_shape="sqrt", final_factor=final_factor
        ),
    ]


def torch_factors(make: object, total_steps: int, warmup_steps: int) -> list[float]:
    """Learning rates from torch's own schedulers, with a peak of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedulers: list[LRScheduler] = []
    if warmup_steps > 1:
        schedulers.append(LinearLR(optimizer, 1 / warmup_steps, 1.0, total_iters=warmup_steps - 1))
    schedulers.append(make(optimizer))
    scheduler = (
        SequentialLR(optimizer, schedulers, milestones=[warmup_steps - 1])
        if len(schedulers) > 1
        else schedulers[0]
    )
    factors = []
    for _ in range(total_steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 50), (1, 50), (2, 3), (10, 50), (49, 50)])
def test_cosine_and_linear_equal_torchs_schedulers(warmup_steps: int, total_steps: int) -> None:
    num_decay_steps = total_steps - 1 - max(warmup_steps - 1, 0)
    references = {
        CosineConfig(warmup_steps=warmup_steps, final_factor=0.2): lambda optimizer: CosineAnnealingLR(
            optimizer, num_decay_steps, eta_min=0.2
        ),
        LinearConfig(warmup_steps=warmup_steps, final_factor=0.2): lambda optimizer: LinearLR(
            optimizer, 1.0, 0.2, total_iters=num_decay_steps
        ),
    }
    for schedule, make in references.items():
        factors = [schedule.factor(step, total_steps) for step in range(total_steps)]
        assert factors == pytest.approx(torch_factors(make, total_steps, warmup_steps), abs=1e-12)


@given(warmup_steps=st.integers(0, 100), total_steps=STEPS, final_factor=FACTORS)
def test_schedules_rise_to_the_peak_fall_to_the_final_factor_and_stay(
    warmup_steps: int, total_steps: int, final_factor: float
) -> None:
    assume(warmup_steps < total_steps - 1)
    for schedule in schedules(warmup_steps, final_factor):
        factors = [schedule.factor(step, total_steps) for step in range(total_steps + 5)]
        warmup, decay = factors[: max(warmup_steps, 1)], factors[max(warmup_steps - 1, 0) :]
        assert all(a <= b for a, b in pairwise(warmup))
        assert all(a >= b - 1e-12 for a, b in pairwise(decay))
        assert factors[0] > 0 or final_factor == 0
        assert max(factors) == factors[max(warmup_steps - 1, 0)] == 1.0
        assert factors[total_steps - 1 :] == pytest.approx([final_factor] * 6, abs=1e-12)


@given(warmup_steps=st.integers(0, 50), total_steps=STEPS)
def test_constant_stays_at_the_peak(warmup_steps: int, total_steps: int) -> None:
    schedule = ConstantConfig(warmup_steps=warmup_steps)
    for step in range(total_steps):
        expected = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
        assert schedule.factor(step, total_steps) == expected


@given(
    warmup_steps=st.integers(0, 50),
    stable_steps=st.integers(1, 100),
    decay_steps=st.integers(1, 100),
    final_factor=FACTORS,
)
def test_warmup_stable_decay_has_three_phases(
    warmup_steps: int, stable_steps: int, decay_steps: int, final_factor: float
) -> None:
    total_steps = warmup_steps + stable_steps + decay_steps
    *_, linear, sqrt = schedules(warmup_steps, final_factor, decay_steps)
    for step in range(warmup_steps, warmup_steps + stable_steps):
        assert linear.factor(step, total_steps) == sqrt.factor(step, total_steps) == 1.0
    for i in range(1, decay_steps + 1):
        step, fraction = warmup_steps + stable_steps - 1 + i, i / decay_steps
        assert linear.factor(step, total_steps) == pytest.approx(1 - (1 - final_factor) * fraction)
        assert sqrt.factor(step, total_steps) == pytest.approx(1 - (1 - final_factor) * math.sqrt(fraction))


@given(extra=st.integers(1, 500))
def test_a_longer_run_has_the_same_stable_phase(extra: int) -> None:
    schedule = WarmupStableDecayConfig(warmup_steps=10, decay_steps=20)
    assert all(schedule.factor(i, 100) == schedule.factor(i, 100 + extra) for i in range(79))


@pytest.mark.parametrize("total_steps", [1, 2])
def test_the_shortest_runs_start_at_the_peak(total_steps: int) -> None:
    for schedule in schedules(1, 0.5):
        assert schedule.factor(0, total_steps) == 1.0


def test_a_schedule_that_does_not_fit_in_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_steps=11 is more than the 10 steps of the run"):
        CosineConfig(warmup_steps=11).check(10)
    with pytest.raises(ConfigError, match=r"warmup_steps=6 and optim\.schedule\.decay_steps=5 add up"):
        WarmupStableDecayConfig(warmup_steps=6, decay_steps=5).check(10)
    CosineConfig(warmup_steps=10).check(10)
    WarmupStableDecayConfig(warmup_steps=5, decay_steps=5).check(10)


def test_the_learning_rate_is_the_peak_times_the_factor_of_the_schedule_chosen_by_type() -> None:
    raw = {"peak_lr": 0.02, "schedule": {"type": "wsd", "warmup_steps": 4, "decay_steps": 5}}
    config = parse(AdamWConfig, raw)
    assert isinstance(config.schedule, WarmupStableDecayConfig)
    assert config.lr(0, 100) == 0.005
    assert config.lr(50, 100) == 0.02


@given(total_steps=st.integers(3, 400), first_factor=st.floats(1e-8, 0.9))
def test_a_range_rises_by_one_factor_a_step_from_its_first_to_the_peak(
    total_steps: int, first_factor: float
) -> None:
    schedule = RangeConfig(first_factor=first_factor)
    factors = [schedule.factor(step, total_steps) for step in range(total_steps)]
    assert factors[0] == pytest.approx(first_factor)
    assert factors[-1] == 1
    ratio = (1 / first_factor) ** (1 / (total_steps - 1))
    assert all(b / a == pytest.approx(ratio) for a, b in pairwise(factors))
    with pytest.raises(ConfigError, match="train longer"):
        schedule.check(2)
