"""Settings of the phases of a run: what each trains, at which rates, and how long."""

from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from distft.config import Settings
from distft.train.early_stopping import EarlyStoppingConfig


class RandomBlocksConfig(Settings):
    """LISA (Pan et al. 2024, arXiv:2403.17919): other blocks train after every few steps."""

    num_blocks: int = Field(ge=1)  # that train at a time, beside what is no block
    every_steps: int = Field(ge=1)  # each change is a commit, and starts the engine anew


class PhaseConfig(Settings):
    """A part of a run. What it leaves out is as in the run's own settings."""

    steps: int | None = Field(None, ge=1)  # its length at most; the last phase ends with the run
    epochs: float | None = Field(None, gt=0, le=1e9)  # the same in passes over the data
    until_stalled: EarlyStoppingConfig | None = None  # ends it earlier
    trainable: tuple[str, ...] | None = None  # patterns of parameter names, as in the run's `trainable`
    random_blocks: RandomBlocksConfig | None = None  # of the trainable ones
    optim: dict[str, Any] = Field({})  # settings of `optim`; a schedule is over the phase's own steps
    dropout: float | None = Field(None, ge=0, lt=1)
    label_smoothing: float | None = Field(None, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("set steps or epochs, not both")
        if "type" in self.optim:
            raise ValueError("optim.type is the same in all phases: set it for the whole run")
        return self

    @property
    def is_open(self) -> bool:
        """Whether nothing but the end of the run is sure to end it."""
        return self.steps is None and self.epochs is None


def phase_problems(phases: Sequence[PhaseConfig], *, evaluates: bool) -> list[str]:
    """What is wrong with the phases of a configuration, apart from its data and model."""
    problems = [
        f"phases.{index}: set steps, epochs or until_stalled: only the last phase may end with the run"
        for index, phase in enumerate(phases[:-1])
        if phase.is_open and phase.until_stalled is None
    ]
    if phases and not (phases[-1].is_open and phases[-1].until_stalled is None):
        last = len(phases) - 1
        problems.append(
            f"phases.{last} is the last one and ends with the run: leave steps, epochs and until_stalled out "
            "(train.early_stopping ends the run)"
        )
    problems += [
        f"phases.{index}.until_stalled needs validation and evaluation.every_steps"
        for index, phase in enumerate(phases)
        if phase.until_stalled is not None and not evaluates
    ]
    return problems
