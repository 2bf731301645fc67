"""The training loop: pretraining and fine-tuning run the same one with different configurations."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from distft.checkpoint.manifest import Progress
from distft.data.batch import AnyBatch
from distft.data.device_copy import batch_copier
from distft.data.feed import AnyFeed, Prefetcher
from distft.engine.interface import Engine
from distft.errors import DivergedError, Preempted, Resized
from distft.objective.interface import Model, Objective, ObjectiveContext
from distft.optim.loss_scale import DynamicLossScale
from distft.topology import BatchPlan, MicroBatch
from distft.train.divergence import advice, losses_that_are_no_numbers
from distft.train.early_stopping import EarlyStopping
from distft.train.experts import ExpertLoad
from distft.train.progress import IntervalSums, LatestTerms, ProgressCounter
from distft.train.schedule import TrainingSchedule
from distft.train.services import STOP_REASONS, TrainerServices
from distft.train.step import StepResult, train_step
from distft.train.throughput import Throughput, peak_memory_bytes
from distft.train.transfers import DeferredRead

_PREFETCH_DEPTH = 8
_MAX_SKIPPED_AT_END = 3  # consecutive steps; one or two are normal in fp16, whose loss scale has to adapt


class Trainer:
    """Runs optimizer steps from `progress` to the last step of `schedule`."""

    def __init__(
        self,
        *,
        engine: Engine,
        objective: Objective,
        context: ObjectiveContext,
        feed: AnyFeed,
        plan: BatchPlan,
        schedule: TrainingSchedule,
        progress: Progress,
        services: TrainerServices,
        throughput: Throughput,
        loss_scale: DynamicLossScale | None = None,
        dropout_seed: int | None = None,
        attention_reach: int | None = None,
        early_stopping: EarlyStopping | None = None,
        experts: ExpertLoad | None = None,
    ) -> None:
        """`dropout_seed` and `attention_reach` as for `Batch.for_step`; `experts` are those of the model."""
        self._engine = engine
        self._experts = experts
        self._objective = objective if experts is None else experts.routed(objective)
        self._context = context
        self._feed = feed
        self._plan = plan
        self._schedule = schedule
        self._progress = ProgressCounter(progress, engine.device)
        self._terms = LatestTerms()
        self._sums = IntervalSums()
        self._services = services
        self._heartbeat = services.heartbeat
        self._collectives = context.collectives
        self._throughput = throughput
        self._loss_scale = loss_scale
        self._dropout_seed = dropout_seed
        self._attention_reach = attention_reach
        self._early_stopping = early_stopping or EarlyStopping(progress)

    @property
    def step(self) -> int:
        """Completed optimizer steps of the run."""
        return self._progress.step

    def run(self) -> Progress:
        """Train to the last step of this phase; returns the progress there.

        Raises `DivergedError` after too many consecutive steps with non-finite gradients, and `Preempted`
        after a requested stop, once the run is saved.
        """
        if self._loss_scale is not None:
            self._engine.set_loss_scale(self._loss_scale.scale)
        self._engine.module.train()
        batches = Prefetcher(
            self._feed,
            self._remaining_micro_batches(),
            depth=_PREFETCH_DEPTH,
            prepare=self._prepare,
            copier=batch_copier(self._engine.device),
        )
        with batches:
            self._throughput.restart()
            while not self._is_phase_over:
                result = self._run_step(batches)
                if self._schedule.is_evaluation_due(self.step):
                    self._evaluate()
                if self._early_stopping.is_run_stalled:  # since nothing was learnt, perhaps
                    self._check_skipped_steps(result)
                if self._is_save_due:
                    self._save()
                if not self._is_run_over:
                    self._stop_if_signalled(result.signals)
        self._wait_for_saves()
        return self._current_progress()

    @property
    def _is_run_over(self) -> bool:
        return self._schedule.is_last(self.step) or self._early_stopping.is_run_stalled

    @property
    def _is_phase_over(self) -> bool:
        stops = self.step >= self._schedule.last_step or self._early_stopping.is_phase_over(self.step)
        return stops or self._is_run_over

    @property
    def _is_save_due(self) -> bool:
        is_due = self._schedule.is_save_due(self.step) or self._early_stopping.is_best(self.step)
        return is_due or self._is_phase_over

    def _remaining_micro_batches(self) -> Iterator[MicroBatch]:
        for step in range(self.step, self._schedule.last_step):
            yield from self._plan.micro_batches(step, self._collectives.dp_rank)

    def _run_step(self, batches: Prefetcher) -> StepResult:
        """Its `signals` are the sums over ranks of `_local_signals`."""
        micro_batches = self._plan.micro_batches(self.step, self._collectives.dp_rank)
        lr = self._schedule.lr_at(self.step)
        if self._schedule.ema_decay_at is not None:
            self._engine.set_ema_decay(self._schedule.ema_decay_at(self.step))
        self._context = replace(self._context, step=self.step)
        wait_s_before = batches.wait_s
        with self._heartbeat.phase("data", step=self.step + 1), self._heartbeat.own_work():
            loaded = [self._next_batch(batches) for _ in micro_batches]
        with self._heartbeat.phase("backward and update"):
            result = train_step(
                self._engine,
                self._objective.prepare_step(self._engine.model, loaded, self._context),
                loss_sums=self._loss_sums,
                num_targets=self._objective.num_targets,
                training_sums=self._objective.training_sums,
                sum_names=self._objective.training_sum_names,
                weights=self._objective.term_weights(self.step),
                group_lr=lambda group: lr * group.lr_scale,
                signals=self._local_signals(),
                before_update=self._services.before_update,
            )
            if self._experts is not None:
                self._experts.finish_step(self._engine, result.is_skipped)
        self._heartbeat.finish_step()
        self._progress.add_step(result)
        self._terms.add_step(result)
        self._sums.add_step(result)
        self._update_loss_scale(result)
        wait_s = batches.wait_s - wait_s_before
        self._throughput.add_step(loaded, self._collectives.dp_world_size, wait_s)
        if self._schedule.is_skip_check_due(self.step):
            self._check_skipped_steps(result)
        if self._schedule.is_log_due(self.step):
            self._services.log(self._metrics(result, lr), self.step)
        return result

    def _prepare(self, batch: AnyBatch) -> AnyBatch:
        """In the prefetching thread."""
        return batch.for_step(self._dropout_seed, self._attention_reach)

    def _next_batch(self, batches: Prefetcher) -> AnyBatch:
        batch = next(batches)
        self._progress.ledger.add(batches.last_micro_batch)
        return batch

    def _loss_sums(self, model: Model, batch: AnyBatch) -> Mapping[str, Tensor]:
        """The loss terms. Ranks wait for each other in the backward; at stage 3 also in the forward."""
        with self._heartbeat.phase("forward"), self._heartbeat.own_work(batch.num_tokens):
            return self._objective.loss_sums(model, batch, self._context)

    def _update_loss_scale(self, result: StepResult) -> None:
        if self._loss_scale is not None:
            is_overflow = result.is_skipped.bool() & (result.num_targets.sum() > 0)
            self._loss_scale.update(is_overflow=is_overflow)
            self._engine.set_loss_scale(self._loss_scale.scale)

    def _check_skipped_steps(self, result: StepResult) -> None:
        """Raise `DivergedError` if too many steps updated nothing, so that no failure counts as completed."""
        in_a_row, skipped = self._progress.skipped_in_a_row, self._progress.skipped_steps
        is_over = self._is_run_over
        remedy = self._remedy(float(result.loss))
        if in_a_row >= self._schedule.max_skipped_in_a_row or (is_over and in_a_row >= _MAX_SKIPPED_AT_END):
            limit = f"the limit is train.max_skipped_in_a_row={self._schedule.max_skipped_in_a_row}"
            at_end = f"at the end of the run it is {_MAX_SKIPPED_AT_END - 1}"
            raise DivergedError(
                f"Steps {self.step - in_a_row + 1} to {self.step} all had gradients that are not finite, so "
                f"the weights are still those of step {self.step - in_a_row} ({limit}; {at_end}). {remedy}"
            )
        if is_over and skipped > self._schedule.max_skipped_share * self.step:
            raise DivergedError(
                f"{skipped} of {self.step} steps had gradients that are not finite and "
                f"updated nothing, more than train.max_skipped_share={self._schedule.max_skipped_share}. "
                f"{remedy}"
            )

    def _metrics(self, result: StepResult, lr: float) -> dict[str, float | int]:
        metrics: dict[str, float | int] = {
            "loss": float(result.loss),
            "lr": lr,
            "grad_norm": float(result.grad_norm),
            "tokens_seen": self._progress.tokens_seen,
            "epoch": self.step * self._plan.global_batch_size / self._feed.num_sequences,
            "skipped_steps": self._progress.skipped_steps,
            **self._optional_metrics(),
            "peak_memory_bytes": max(self._collectives.all_gather(peak_memory_bytes(self._engine.device))),
            **self._throughput.read(),
        }
        if self._loss_scale is not None:
            metrics["loss_scale"] = float(self._loss_scale.scale)
        return metrics

    def _optional_metrics(self) -> dict[str, float | int]:
        last = self.step - 1
        terms = self._terms.read(list(self._objective.term_weights(last)))
        metrics: dict[str, float | int] = {
            **self._objective.term_metrics(terms, last),
            **self._objective.training_metrics(self._sums.read(self._objective.training_sum_names)),
        }
        if self._experts is not None:
            metrics |= self._experts.metrics()
        if self._progress.steps_without_targets:
            metrics["steps_without_targets"] = self._progress.steps_without_targets
        return metrics

    def _evaluate(self) -> None:
        with self._heartbeat.phase("evaluation"):
            metrics = self._services.evaluate(self.step)
            self._early_stopping.add(metrics, self.step)
            self._services.log({f"validation/{name}": value for name, value in metrics.items()}, self.step)
        if self._is_run_over and (lost := losses_that_are_no_numbers(metrics)):
            shown = ", ".join(f"validation/{name}={value}" for name, value in lost.items())
            raise DivergedError(
                f"The run ends at step {self.step} with {shown}: its weights are useless. "
                f"{self._remedy(next(iter(lost.values())))} Train in another run_dir: this one goes on from "
                "what it has saved."
            )
        self._throughput.restart()

    def _remedy(self, loss: float) -> str:
        """Advice on a run that diverged, whose last loss this is."""
        progress = self._progress
        return advice(
            loss=loss,
            num_updates=self.step - progress.skipped_steps - progress.steps_without_targets,
            loss_scale=None if self._loss_scale is None else float(self._loss_scale.scale),
        )

    def _save(self) -> None:
        with self._heartbeat.phase("save"):
            self._services.save(self._current_progress())
        self._throughput.restart()

    def _wait_for_saves(self) -> None:
        with self._heartbeat.phase("save"):
            self._services.wait_for_saves()

    def _current_progress(self) -> Progress:
        return self._progress.to_progress(self._plan, self._context, self._loss_scale, self._early_stopping)

    def _local_signals(self) -> list[int]:
        """1 for each of `STOP_REASONS` that holds on this rank, and for a failed save."""
        reason = self._services.stop_requested()
        return [*(int(reason == known) for known in STOP_REASONS), int(self._services.has_failed_save())]

    def _stop_if_signalled(self, signals: DeferredRead) -> None:
        """Save and stop on all ranks if any rank was asked to; raise if a save failed on any rank."""
        *stop_counts, num_failed_saves = signals.get()
        if num_failed_saves:
            self._wait_for_saves()
        reasons = {reason for reason, count in zip(STOP_REASONS, stop_counts, strict=True) if count}
        if not reasons:
            return
        if not self._is_save_due:
            self._save()
        self._wait_for_saves()
        if "requested" in reasons:
            raise Preempted(f"Stopped at step {self.step} as asked; start again to resume from there.")
        if "drain" in reasons:
            raise Resized(f"Saved at step {self.step}, since a node is about to leave.")
        raise Resized(f"Saved at step {self.step}, to continue with another number of ranks.")
