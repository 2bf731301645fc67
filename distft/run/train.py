"""Trains a run as configured, on each rank, under any launcher."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from distft import storage
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.formats.detect import attach_base
from distft.checkpoint.manifest import MANIFEST, Progress
from distft.checkpoint.store import CheckpointStore
from distft.collectives import Collectives, ProcessGroup
from distft.errors import Interrupted, Preempted, SupersededError
from distft.run.check import check_run, check_supervised_alone
from distft.run.comparison import log_comparison
from distft.run.config import RunConfig
from distft.run.engines import build_collectives, choose_device
from distft.run.environment import launch_name
from distft.run.phase_run import PhaseRun
from distft.run.phases import inputs_of_span, span_at
from distft.run.reference import with_reference
from distft.run.resume import claim_run, is_over
from distft.run.run_dir import RunRecord, open_run_dir
from distft.run.run_inputs import RunInputs
from distft.run.stop_signals import stop_on_signals
from distft.topology import BatchPlan, Topology
from distft.train.services import StopRequested, never_stop
from distft.watch.device_clock import device_clock
from distft.watch.watchdog import Watchdog

_MIN_STRAGGLER_INTERVAL_STEPS = 10
ENCODED_DIR = "encoded"  # of a run: labelled texts and completions, which one rank encodes for all


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """Result of a finished run, on every rank."""

    step: int
    metrics: Mapping[str, float]  # the last value of each name; validation metrics under validation/
    checkpoint: str | None  # the last one that this process committed


def run_training(
    config: RunConfig, topology: Topology, stop_requested: StopRequested = never_stop
) -> RunResult:
    """Train from the run's latest checkpoint, or its beginning, to its end, on this rank.

    Raises errors in the configuration and the data before it uses a device. Raises `Preempted` after SIGTERM
    or Ctrl-C, or after `stop_requested` of any rank returns a reason, once the run is saved; `Interrupted`
    after a second Ctrl-C.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    cache_dir = storage.join(config.run_dir, ENCODED_DIR) if topology.world_size > 1 else None
    plan, inputs = check_run(config, topology, cache_dir)
    runs = [(plan, inputs)]
    alone = check_supervised_alone(inputs, topology, cache_dir)
    if alone is not None:
        runs.insert(0, alone)
    device = choose_device(config, topology)
    collectives = build_collectives(config, topology, device)
    has_failed = True
    try:
        for plan, inputs in runs:
            result = _train_one(inputs, plan, collectives, device, stop_requested)
        has_failed = False
        return result
    except Preempted:  # on all ranks
        has_failed = False
        raise
    finally:
        if isinstance(collectives, ProcessGroup):
            collectives.close(has_failed=has_failed)


def _train_one(
    inputs: RunInputs,
    plan: BatchPlan,
    collectives: Collectives,
    device: torch.device,
    stop_requested: StopRequested,
) -> RunResult:
    config = inputs.config
    watchdog = Watchdog(
        collectives,
        Path(config.run_dir),
        heartbeat_s=config.heartbeat_s,
        hang_timeout_s=config.hang_timeout_s,
        interval_steps=max(config.train.log_every_steps, _MIN_STRAGGLER_INTERVAL_STEPS),
        clock=device_clock(device),
    )
    with watchdog:
        run = TrainingRun(inputs, plan, collectives, device, watchdog=watchdog, stop_requested=stop_requested)
        return run.train()


class TrainingRun:
    """One rank's run, from its latest checkpoint to its last step."""

    def __init__(
        self,
        inputs: RunInputs,
        plan: BatchPlan,
        collectives: Collectives,
        device: torch.device,
        *,
        watchdog: Watchdog,
        stop_requested: StopRequested,
    ) -> None:
        self._inputs = inputs
        self._config = inputs.config
        self._plan = plan
        self._collectives = collectives
        self._device = device
        self._watchdog = watchdog
        self._stop_requested = stop_requested
        directory = self._config.checkpoint.directory or storage.join(self._config.run_dir, "checkpoints")
        # The saver's thread needs a group of its own: this thread uses the other one at the same time.
        self._store = CheckpointStore(directory, collectives.with_new_group(), attach_base)
        self._step = 0  # completed steps of the run
        self._saved_step: int | None = None  # the last one that is committed

    def train(self) -> RunResult:
        latest = claim_run(
            self._store,
            self._inputs,
            self._collectives,
            launch=launch_name(),
        )
        record = open_run_dir(
            self._inputs,
            latest,
            self._collectives,
            self._device,
            total_steps=self._inputs.total_steps,
        )
        progress = Progress() if latest.checkpoint is None else latest.checkpoint.manifest.progress
        self._step, self._saved_step = progress.step, None if latest.checkpoint is None else progress.step
        status = "failed"
        try:
            if not is_over(progress, self._inputs):
                result = self._train_from(latest.checkpoint, progress, record)
            else:
                result = self._log_nothing_to_do(progress, record)
            if self._collectives.rank == 0:
                log_comparison(self._config, record.trackers)
            status = "completed"
        except Preempted:
            status = "preempted"
            raise
        except KeyboardInterrupt:
            status = "interrupted"
            raise Interrupted(self._describe_interruption()) from None
        except SupersededError as error:
            record.trackers.event("superseded", reason=str(error))
            status = "superseded"
            raise
        finally:
            record.trackers.finish(status, step=self._step)
        return result

    def _describe_interruption(self) -> str:
        if self._saved_step is None:
            return f"Interrupted at step {self._step}. Nothing is saved yet: the same command starts anew."
        lost = self._step - self._saved_step
        again = f", and does {lost} steps again" if lost else ""
        return (
            f"Interrupted at step {self._step}. Step {self._saved_step} is saved: the same command goes on "
            f"from there{again}."
        )

    def _log_nothing_to_do(self, progress: Progress, record: RunRecord) -> RunResult:
        total_steps = self._inputs.total_steps
        reason = {}
        if progress.step > total_steps:
            reason = {"reason": "the run is already beyond its last step"}
        elif progress.step < total_steps:
            reason = {"reason": "train.early_stopping has ended the run"}
        record.trackers.event("nothing_to_do", step=progress.step, total_steps=total_steps, **reason)
        return RunResult(step=progress.step, metrics={}, checkpoint=None)

    def _train_from(self, checkpoint: Checkpoint | None, progress: Progress, record: RunRecord) -> RunResult:
        """Train phase after phase: each starts from the commit with which the one before ended."""
        metrics: dict[str, float] = {}
        self._inputs = with_reference(
            self._inputs,
            self._plan,
            self._collectives,
            self._device,
            root=self._store.root,
            on_note=lambda note: record.trackers.event("note", note=note),
        )
        with stop_on_signals(self._stop_requested, on_request=record.announce_stop) as stop_requested:
            while True:
                span = span_at(self._inputs, progress.phase_starts, progress.step)
                phase = PhaseRun(
                    inputs_of_span(self._inputs, span),
                    span,
                    self._inputs.config,
                    plan=self._plan,
                    collectives=self._collectives,
                    device=self._device,
                    store=self._store,
                    record=record,
                    watchdog=self._watchdog,
                    stop_requested=stop_requested,
                )
                try:
                    progress = phase.train(checkpoint, progress, self._saved_step)
                finally:
                    self._step, self._saved_step = phase.step, phase.saved_step
                metrics |= phase.metrics
                if is_over(progress, self._inputs):
                    break
                checkpoint = self._store.open(progress.step)
        num_phases = len(self._config.phases)
        if span.index + 1 < num_phases:
            record.trackers.event(
                "note",
                note=f"the run ended in phase {span.index + 1} of {num_phases}: the others never began",
            )
        self._announce_best(progress, record)
        return RunResult(step=progress.step, metrics=metrics, checkpoint=phase.last_checkpoint)

    def _announce_best(self, progress: Progress, record: RunRecord) -> None:
        best = progress.best_of_run
        if best is None:
            return
        kind = "early_stop" if progress.step < self._inputs.total_steps else "best"
        if best.value is None:
            note = f"no evaluation had a finite {best.metric}, so no commit is the best"
            record.trackers.event(kind, step=progress.step, metric=best.metric, note=note)
            return
        is_kept = storage.exists(storage.join(self._store.path(best.step), MANIFEST))
        note = f"{self._config.run_dir} stands for its best commit, that of step {best.step}"
        record.trackers.event(
            kind,
            step=progress.step,
            metric=best.metric,
            best=best.value,
            best_step=best.step,
            note=note if is_kept else f"its best commit, that of step {best.step}, is gone",
        )
