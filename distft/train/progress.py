"""Counts the progress of a run: steps, tokens, skipped steps and the sequences used."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distft.checkpoint.manifest import Progress
from distft.objective.interface import ObjectiveContext
from distft.optim.loss_scale import DynamicLossScale
from distft.topology import BatchPlan
from distft.train.early_stopping import EarlyStopping
from distft.train.ledger import SequenceLedger, merge_intervals
from distft.train.step import StepResult


class LatestTerms:
    """Each loss term of the last step that measured it: a step may have targets of some terms only."""

    def __init__(self) -> None:
        self._terms: Tensor | None = None
        self._is_known: Tensor | None = None

    def add_step(self, result: StepResult) -> None:
        if self._terms is None or self._is_known is None:
            self._terms, self._is_known = result.terms, result.is_measured
            return
        self._terms = torch.where(result.is_measured, result.terms, self._terms)
        self._is_known = self._is_known | result.is_measured

    def read(self, names: Sequence[str]) -> dict[str, float]:
        """By name, those that some step has measured; waits for the device."""
        if self._terms is None or self._is_known is None:
            return {}
        values = zip(names, self._terms.tolist(), self._is_known.tolist(), strict=True)
        return {name: value for name, value, is_known in values if is_known}


class IntervalSums:
    """Sums for `Objective.training_metrics` over the steps since they were last read, in this process."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add_step(self, result: StepResult) -> None:
        sums = result.sums.double()  # float32 counts to 16.7 million only
        self._sums = sums if self._sums is None else self._sums + sums

    def read(self, names: Sequence[str]) -> dict[str, float]:
        """By name, and start anew; empty without a step. Waits for the device."""
        if self._sums is None or not names:
            return {}
        values, self._sums = self._sums.tolist(), None
        return dict(zip(names, values, strict=True))


class ProgressCounter:
    """Continues to count from a saved `Progress`.

    Counters of a step's results stay on the device: reading one waits for the device.
    """

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self.step = progress.step
        self.ledger = SequenceLedger()
        self._used, self._used_again = progress.used, progress.used_again
        self._tokens_seen = torch.tensor(progress.tokens_seen, device=device)
        self._skipped = torch.tensor(float(progress.skipped_steps), device=device)
        self._skipped_in_a_row = torch.tensor(float(progress.skipped_in_a_row), device=device)
        self._without_targets = torch.tensor(float(progress.steps_without_targets), device=device)

    def add_step(self, result: StepResult) -> None:
        self.step += 1
        num_targets = result.num_targets.sum()
        is_empty = (num_targets == 0).float()
        is_skipped = result.is_skipped * (1 - is_empty)
        self._tokens_seen += result.num_tokens
        self._skipped += is_skipped
        self._skipped_in_a_row = (self._skipped_in_a_row + 1 - is_empty) * (is_skipped + is_empty)
        self._without_targets += is_empty

    @property
    def tokens_seen(self) -> int:
        return int(self._tokens_seen)

    @property
    def skipped_steps(self) -> int:
        return int(self._skipped)

    @property
    def skipped_in_a_row(self) -> int:
        return int(self._skipped_in_a_row)

    @property
    def steps_without_targets(self) -> int:
        return int(self._without_targets)

    def to_progress(
        self,
        plan: BatchPlan,
        context: ObjectiveContext,
        loss_scale: DynamicLossScale | None,
        early_stopping: EarlyStopping,
    ) -> Progress:
        """The progress to save, with the sequences that all ranks used. Called by all ranks together."""
        used_by_rank = context.collectives.all_gather(self.ledger.take())
        used = [interval for intervals in used_by_rank for interval in intervals]
        self._used, used_again = merge_intervals([*self._used, *used])
        self._used_again, _ = merge_intervals([*self._used_again, *used_again])
        return Progress(
            step=self.step,
            sequences_seen=self.step * plan.global_batch_size,
            used=self._used,
            used_again=self._used_again,
            tokens_seen=self.tokens_seen,
            skipped_steps=self.skipped_steps,
            skipped_in_a_row=self.skipped_in_a_row,
            steps_without_targets=self.steps_without_targets,
            loss_scale=None if loss_scale is None else loss_scale.state_dict(),
            objective_state={name: values.tolist() for name, values in context.state.items()},
            phase_starts=early_stopping.phase_starts(self.step),
            best_of_phase=None if early_stopping.is_phase_over(self.step) else early_stopping.best_of_phase,
            best_of_run=early_stopping.best_of_run,
        )
