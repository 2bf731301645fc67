"""Whether a run has diverged, and what to do about it, as far as the run's own numbers tell the cause."""

import math
from collections.abc import Mapping


def advice(*, loss: float, num_updates: int, loss_scale: float | None) -> str:
    """Sentences for the error. `loss` is the last one, `num_updates` of the run before; fp16 has a scale."""
    if num_updates:
        return (
            f"The last loss is {loss}. Lower optim.peak_lr, lengthen the warm-up, or inspect the data of "
            "these steps."
        )
    nothing_yet = "and no step has updated a weight, so that the learning rate is not the cause"
    if not math.isfinite(loss):
        of_fp16 = "" if loss_scale is None else " fp16 ends at 65,504: engine.param_dtype=bf16 goes further."
        return (
            f"The last loss is {loss}, {nothing_yet}: it is what the first weights make of the data. Inspect "
            f"both (the weights of init_from by `distft checkpoint inspect --statistics`).{of_fp16}"
        )
    if loss_scale is not None:
        return (
            f"The last loss is {loss}, {nothing_yet}: the gradients overflow fp16 at a loss scale of "
            f"{loss_scale:g}. Give the scale more steps to fall by train.max_skipped_in_a_row, or set "
            "engine.param_dtype=bf16."
        )
    return (
        f"The last loss is {loss}, {nothing_yet}: the gradients overflow where the loss does not. Inspect "
        "the first weights and the data for values that are very large."
    )


def losses_that_are_no_numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of an evaluation, by name: of the whole, and of the parts of a mixture.

    A short run may end so without enough steps of gradients that are not finite, or without any.
    """
    return {
        name: value
        for name, value in metrics.items()
        if name.rpartition("/")[2] == "loss" and not math.isfinite(value)
    }
