"""How long a run trains, its learning rate, and when it logs, evaluates and saves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from distft.config import Settings
from distft.train.early_stopping import EarlyStoppingConfig

_LEAST_SHARE = 0.1  # of the interval of evaluations, between the last two of a run


class TrainConfig(Settings):
    """How long a run trains and how often it logs. Set either `max_steps` or `num_epochs`."""

    max_steps: int | None = Field(default=None, ge=1)  # optimizer steps, counted from the start of the run
    num_epochs: float | None = Field(default=None, gt=0)  # passes over the training sequences
    log_every_steps: int = Field(default=10, ge=1)
    max_skipped_in_a_row: int = Field(default=20, ge=1)  # steps with non-finite gradients that end the run
    max_skipped_share: float = Field(default=0.5, ge=0, le=1)  # of all steps; more fails the run at its end
    early_stopping: EarlyStoppingConfig | None = None  # ends the run before; its best commit is kept

    @model_validator(mode="after")
    def _require_one_length(self) -> Self:
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError(
                "set either max_steps or num_epochs; to unset a value from the file: num_epochs=null"
            )
        return self

    def total_steps(self, *, num_sequences: int, global_batch_size: int) -> int:
        """Optimizer steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_epochs is not None
        return steps_of_epochs(self.num_epochs, num_sequences, global_batch_size)


def steps_of_epochs(num_epochs: float, num_sequences: int, global_batch_size: int) -> int:
    """Optimizer steps, one at least. The last batch may extend into a further epoch."""
    return max(1, -(-int(num_epochs * num_sequences) // global_batch_size))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSchedule:
    """When things happen, by number of completed optimizer steps."""

    total_steps: int
    lr_at: Callable[[int], float]  # learning rate of the step after this many, before a group's scale
    log_every_steps: int
    max_skipped_in_a_row: int
    max_skipped_share: float
    save_every_steps: int | None  # in addition to the last step; None: no others
    evaluate_every_steps: int | None  # None: not during training
    evaluate_at_end: bool
    ema_decay_at: Callable[[int], float] | None = None  # of the weights' average, if there is one
    stop_step: int | None = None  # the last step of this phase of the run; None: of the run

    @property
    def last_step(self) -> int:
        """To which this phase trains."""
        return self.total_steps if self.stop_step is None else self.stop_step

    def is_last(self, step: int) -> bool:
        return step == self.total_steps

    def is_log_due(self, step: int) -> bool:
        return step % self.log_every_steps == 0 or self.is_last(step)

    def is_skip_check_due(self, step: int) -> bool:
        """Whether to read the number of consecutive skipped steps, which waits for the device."""
        return self.is_log_due(step) or step % self.max_skipped_in_a_row == 0

    def is_save_due(self, step: int) -> bool:
        return _is_multiple(step, self.save_every_steps) or step == self.last_step

    def is_evaluation_due(self, step: int) -> bool:
        """Not shortly before the end, if the run is evaluated there anyway."""
        if self.evaluate_at_end and self.is_last(step):
            return True
        if self.evaluate_every_steps is None or step % self.evaluate_every_steps:
            return False
        steps_to_end = self.total_steps - step
        return not self.evaluate_at_end or steps_to_end >= _LEAST_SHARE * self.evaluate_every_steps


def _is_multiple(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0
