"""The advice after steps without a finite gradient names no cause that the run's numbers exclude."""

import itertools
import math

import pytest

from distft.train.divergence import advice


@pytest.mark.parametrize(
    ("loss", "num_updates", "loss_scale"),
    list(itertools.product([2.5, math.inf, math.nan], [0, 1, 100], [None, 1024.0])),
)
def test_the_rate_is_blamed_only_after_an_update(
    loss: float, num_updates: int, loss_scale: float | None
) -> None:
    found = advice(loss=loss, num_updates=num_updates, loss_scale=loss_scale)
    assert f"The last loss is {loss}" in found
    assert ("Lower optim.peak_lr" in found) == (num_updates > 0)
    assert ("the learning rate is not the cause" in found) == (num_updates == 0)
    if not num_updates:
        assert ("it is what the first weights make of the data" in found) == (not math.isfinite(loss))
        assert ("fp16" in found) == (loss_scale is not None)
        assert ("loss scale of 1024" in found) == (loss_scale is not None and math.isfinite(loss))
