"""Steps whose gradients are not finite change nothing, are counted over resumes, and do not count as done."""

from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
from support.small_runs import events, logged, pretraining, run, run_until_power_cut

from distft.checkpoint.committed import find_checkpoint
from distft.errors import DivergedError
from distft.objective.causal_lm import CausalLM
from distft.topology import Topology
from distft.train.loop import Trainer


def _poison(monkeypatch: pytest.MonkeyPatch, steps: Set[int]) -> None:
    """From now on the gradients of these steps are NaN."""
    loss_sums, run_step = CausalLM.loss_sums, Trainer._run_step
    poisoned = {"now": False}

    def run_step_or_poison(trainer: Trainer, *arguments: Any) -> Any:
        poisoned["now"] = trainer.step + 1 in steps
        return run_step(trainer, *arguments)

    def loss_or_nan(*arguments: Any) -> Any:
        factor = float("nan") if poisoned["now"] else 1.0
        return {name: value * factor for name, value in loss_sums(*arguments).items()}

    monkeypatch.setattr(Trainer, "_run_step", run_step_or_poison)
    monkeypatch.setattr(CausalLM, "loss_sums", loss_or_nan)


def test_a_loss_scale_that_overflows_have_lowered_goes_on_over_a_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, {1, 2, 3, 6})
    engine = {"type": "local", "param_dtype": "fp16"}
    run(Topology(), pretraining(data, tmp_path / "straight", engine=engine))
    broken = pretraining(data, tmp_path / "broken", engine=engine)
    run_until_power_cut(broken, 5)
    run(Topology(), broken)
    for name in ("loss_scale", "skipped_steps", "loss"):
        assert logged(tmp_path / "broken", name) == logged(tmp_path / "straight", name), name
    scales = logged(tmp_path / "broken", "loss_scale")
    # The second overflow is the first to halve it, and from then on each does: also the one after the resume.
    assert [scales[step] / 2**16 for step in (1, 2, 3, 5, 6, 12)] == [1, 1 / 2, 1 / 4, 1 / 4, 1 / 8, 1 / 8]
    straight, resumed = (
        find_checkpoint(str(tmp_path / name)).manifest.progress for name in ("straight", "broken")
    )
    assert resumed.loss_scale == straight.loss_scale
    assert resumed.loss_scale is not None
    assert resumed.loss_scale["good_steps"] == 6


def test_skips_in_a_row_are_counted_over_a_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, {3, 4, 5})
    train = {"max_steps": 12, "log_every_steps": 1, "max_skipped_in_a_row": 3}
    raw = pretraining(data, tmp_path, train=train)
    run_until_power_cut(raw, 4)
    with pytest.raises(DivergedError, match=r"Steps 3 to 5 all had .* loss is nan\. Lower optim.peak_lr"):
        run(Topology(), raw)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_a_run_in_which_no_step_updates_the_weights_does_not_count_as_done(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    _poison(monkeypatch, set(range(1, num_steps + 1)))
    optim = {"peak_lr": 0.01, "schedule": {"type": "cosine", "warmup_steps": 0}}
    train = {"max_steps": num_steps, "log_every_steps": 6}
    raw = pretraining(data, tmp_path, train=train, optim=optim, validation=None)
    with pytest.raises(DivergedError, match="gradients that are not finite") as caught:
        run(Topology(), raw)
    assert caught.value.exit_code == 2  # the same command would fail again
    assert "loss is nan, and no step has updated a weight, so that the learning rate is not" in str(
        caught.value
    )
    assert "peak_lr" not in str(caught.value)
    assert events(tmp_path)[-1]["status"] == "failed"
