import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.count_waits import CountWaits

from distft.optim.loss_scale import DynamicLossScale, LossScaleConfig

OVERFLOWS = st.lists(st.booleans(), max_size=60)


@given(overflows=OVERFLOWS, growth_steps=st.integers(1, 8))
def test_without_hysteresis_the_scale_equals_that_of_torchs_grad_scaler(
    overflows: list[bool], growth_steps: int
) -> None:
    loss_scale = LossScaleConfig(growth_steps=growth_steps, hysteresis=1, min_scale=2.0**-60).build()
    scale, tracker = torch.tensor(2.0**16), torch.tensor(0, dtype=torch.int32)
    for is_overflow in overflows:
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(is_overflow)), 2.0, 0.5, growth_steps)
        loss_scale.update(is_overflow=is_overflow)
        assert loss_scale.scale == scale.item()


@given(overflows=OVERFLOWS, growth_steps=st.integers(1, 8), hysteresis=st.integers(1, 4))
def test_the_scale_halves_only_from_the_hysteresis_th_overflow_after_a_growth(
    overflows: list[bool], growth_steps: int, hysteresis: int
) -> None:
    loss_scale = LossScaleConfig(growth_steps=growth_steps, hysteresis=hysteresis).build()
    since_growth = good = 0
    for is_overflow in overflows:
        before = loss_scale.scale
        loss_scale.update(is_overflow=is_overflow)
        since_growth += is_overflow
        good = 0 if is_overflow else good + 1
        if is_overflow:
            assert loss_scale.scale == (max(before / 2, 1.0) if since_growth >= hysteresis else before)
        elif good % growth_steps == 0:
            assert loss_scale.scale == 2 * before
            since_growth = 0
        else:
            assert loss_scale.scale == before


@given(overflows=OVERFLOWS, cut=st.integers(0, 60), hysteresis=st.integers(1, 3))
def test_a_resumed_scale_continues_like_an_uninterrupted_one(
    overflows: list[bool], cut: int, hysteresis: int
) -> None:
    settings = LossScaleConfig(growth_steps=3, hysteresis=hysteresis)
    straight, before, after = (DynamicLossScale(settings) for _ in range(3))
    for is_overflow in overflows:
        straight.update(is_overflow=is_overflow)
    for is_overflow in overflows[:cut]:
        before.update(is_overflow=is_overflow)
    after.load_state_dict(before.state_dict())
    for is_overflow in overflows[cut:]:
        after.update(is_overflow=is_overflow)
    assert after.state_dict() == straight.state_dict()


def test_the_scale_starts_at_65536_and_never_falls_below_its_minimum() -> None:
    scale = LossScaleConfig().build()
    assert scale.scale == 65536.0
    for _ in range(100):
        scale.update(is_overflow=True)
    assert scale.scale == 1.0


@pytest.mark.parametrize("factor", [1, 1.25, 1.5])
def test_the_scale_grows_as_far_as_its_double_is_finite(factor: float) -> None:
    initial, largest = factor * 2.0**16, factor * 2.0**127
    scale = LossScaleConfig(initial_scale=initial, growth_steps=1).build()
    for _ in range(200):
        scale.update(is_overflow=False)
    assert scale.scale == largest


def test_scale_and_counters_are_on_the_device_from_the_start() -> None:
    """An update on the host would wait for the device in every step."""
    scale = LossScaleConfig().build(torch.device("meta"))
    tensors = [value for value in vars(scale).values() if isinstance(value, torch.Tensor)]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 3
    # Counted in whole numbers: a float32 stands still from 16,777,216 on.
    assert [tensor.dtype for tensor in tensors] == [torch.float32, torch.int64, torch.int64]


@given(overflows=OVERFLOWS)
def test_an_update_reads_nothing_from_the_device_and_changes_no_tensor_that_was_given_out(
    overflows: list[bool],
) -> None:
    settings = LossScaleConfig(growth_steps=3)
    on_device, expected = settings.build(), settings.build()
    given_out = on_device.scale
    with CountWaits() as counter:
        for is_overflow in overflows:
            on_device.update(is_overflow=torch.full((), is_overflow))
    for is_overflow in overflows:
        expected.update(is_overflow=is_overflow)
    assert counter.found == []
    assert given_out == 65536.0
    assert on_device.state_dict() == expected.state_dict()
