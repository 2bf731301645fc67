"""The one loop: pretraining and fine-tuning differ in what they are configured with."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distft.checkpoint.manifest import Progress
from distft.collectives import Collectives
from distft.config import Settings
from distft.data.batch import Batch
from distft.data.feed import Feed, Prefetcher
from distft.engine.interface import Engine
from distft.errors import Preempted, Resized, TrainingError
from distft.optim.loss_scale import DynamicLossScale
from distft.topology import BatchPlan, MicroBatch
from distft.train.ledger import Ledger, merged
from distft.train.step import StepResult, SummedLoss, train_step
from distft.train.throughput import Throughput, peak_memory_bytes
from distft.watch.pulse import Pulse

Metrics = Mapping[str, float | int]
StopReason = Literal[
    "asked", "resize", "drain"
]  # to save and end: somebody wants it, there is room for more, a node leaves
StopAsked = Callable[[], StopReason | None]


class TrainConfig(Settings):
    """How long a run goes, and what it says on the way. One of `max_steps` and `num_epochs` is given."""

    max_steps: int | None = Field(default=None, ge=1)  # optimizer steps, from the very start of the run
    num_epochs: float | None = Field(default=None, gt=0)  # passes over the training sequences
    log_every_steps: int = Field(default=10, ge=1)
    max_skipped_in_a_row: int = Field(default=20, ge=1)  # steps with non-finite gradients that end the run

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.max_steps is None) == (self.num_epochs is None):
            raise ValueError(
                "give one of max_steps and num_epochs; to take one that the file gives away: num_epochs=null"
            )
        return self

    def total_steps(self, *, num_sequences: int, global_batch_size: int) -> int:
        """Optimizer steps of the whole run; the last batch of the last epoch may run into a next one."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.num_epochs is not None
        return max(1, -(-int(self.num_epochs * num_sequences) // global_batch_size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Callbacks:
    """What the loop calls at its edges; each is called on every rank."""

    log: Callable[[Metrics, int], None]  # metrics, step
    save: Callable[[Progress], None]  # may go on in the background
    has_save_failed: Callable[[], bool]
    settle: Callable[[], None]  # wait until what was saved is committed; raises what went wrong
    evaluate: Callable[[], Metrics] | None
    stop_asked: StopAsked


def never_asked() -> None:
    """A `StopAsked` of runs that nobody stops."""


class Cadence(Protocol):
    """When something is due."""

    def __call__(self, step: int) -> bool:
        """Whether it is, after `step` steps."""


def every(num_steps: int | None) -> Cadence:
    """Due after each `num_steps` steps; never for None."""
    return lambda step: num_steps is not None and step % num_steps == 0


class Trainer:
    """Runs optimizer steps from where `progress` stands to `total_steps`."""

    def __init__(
        self,
        *,
        engine: Engine,
        objective: SummedLoss,
        feed: Feed,
        plan: BatchPlan,
        lr_at: Callable[[int], float],
        total_steps: int,
        config: TrainConfig,
        callbacks: Callbacks,
        collectives: Collectives,
        throughput: Throughput,
        progress: Progress,
        save_due: Cadence,
        evaluation_due: Cadence,
        loss_scale: DynamicLossScale | None = None,
        dropout_seed: int | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self._engine = engine
        self._objective = objective
        self._feed = feed
        self._plan = plan
        self._lr_at = lr_at
        self._total_steps = total_steps
        self._config = config
        self._callbacks = callbacks
        self._collectives = collectives
        self._throughput = throughput
        self._save_due = save_due
        self._evaluation_due = evaluation_due
        self._loss_scale = loss_scale
        self._dropout_seed = dropout_seed
        self._pulse = pulse or Pulse()
        self._step = progress.step
        self._ledger = Ledger()
        self._used, self._used_again = progress.used, progress.used_again
        # Counters stay on the device: reading them at every step would wait for it at every step.
        device = engine.device
        self._tokens_seen = torch.tensor(progress.tokens_seen, device=device)
        self._skipped = torch.tensor(float(progress.skipped_steps), device=device)
        self._skipped_in_a_row = torch.tensor(float(progress.skipped_in_a_row), device=device)

    def run(self) -> Progress:
        """Train to the end; returns how far the run came.

        Raises `TrainingError` after too many steps in a row without finite gradients, and `Preempted` once a
        stop was asked for and the run's state is saved.
        """
        if self._loss_scale is not None:
            self._engine.set_loss_scale(self._loss_scale.scale)
        self._engine.module.train()
        last_saved = self._step
        with Prefetcher(self._feed, self._remaining(), depth=8) as batches:
            self._throughput.restart()
            while self._step < self._total_steps:
                self._one_step(batches)
                if self._evaluation_due(self._step) or self._is_finished:
                    self._evaluate()
                if self._save_due(self._step) or self._is_finished:
                    self._save()
                    last_saved = self._step
                self._stop_if_asked(last_saved)
        self._callbacks.settle()
        return self.progress()

    @property
    def _is_finished(self) -> bool:
        return self._step == self._total_steps

    def _remaining(self) -> Iterator[MicroBatch]:
        for step in range(self._step, self._total_steps):
            yield from self._plan.micro_batches(step, self._collectives.rank)

    def _one_step(self, batches: Prefetcher) -> None:
        waited_s = batches.wait_s
        self._pulse.enter("data", self._step + 1)
        places = self._plan.micro_batches(self._step, self._collectives.rank)
        micro_batches = []
        with self._pulse.own_work():
            for _ in places:
                micro_batches.append(next(batches))
                self._ledger.add(batches.taken)
        lr = self._lr_at(self._step)
        result = train_step(
            self._engine,
            self._forward,
            micro_batches,
            lr=lr,
            before_forward=lambda index: self._seed_dropout(places[index]),
        )
        self._step += 1
        self._pulse.finish_step()
        self._account(result)
        num_tokens = _num_computed_tokens(micro_batches) * self._collectives.world_size
        self._throughput.add_step(num_tokens, batches.wait_s - waited_s)
        is_log_due = self._step % self._config.log_every_steps == 0 or self._is_finished
        if is_log_due or self._step % self._config.max_skipped_in_a_row == 0:
            self._check_skips(result)
        if is_log_due:
            self._callbacks.log(self._read(result, lr), self._step)

    def _forward(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The objective's loss. Ranks meet in the backward; in the forward too at stage 3."""
        self._pulse.enter("forward")
        with self._pulse.own_work(batch.input_ids.numel()):
            loss = self._objective(model, batch)
        self._pulse.enter("backward and update")
        return loss

    def _seed_dropout(self, place: MicroBatch) -> None:
        """Random draws are a function of the sequences they fall on, so a resume repeats them."""
        if self._dropout_seed is not None:
            digest = hashlib.blake2b(f"{self._dropout_seed}/{place.start}".encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(digest, "little", signed=True))

    def _account(self, result: StepResult) -> None:
        self._tokens_seen += result.num_tokens
        self._skipped += result.is_skipped
        self._skipped_in_a_row = (self._skipped_in_a_row + 1) * result.is_skipped
        if self._loss_scale is not None:
            self._loss_scale.update(is_overflow=bool(result.is_skipped))
            self._engine.set_loss_scale(self._loss_scale.scale)

    def _check_skips(self, result: StepResult) -> None:
        in_a_row = int(self._skipped_in_a_row)
        if in_a_row >= self._config.max_skipped_in_a_row:
            raise TrainingError(
                f"Steps {self._step - in_a_row + 1} to {self._step} all had gradients that are not finite "
                f"(the last loss is {float(result.loss)}), so nothing was updated since. "
                "Lower optim.peak_lr, lengthen the warm-up, or look at the data of these steps; "
                "the last checkpoint is good. train.max_skipped_in_a_row is the limit."
            )

    def _read(self, result: StepResult, lr: float) -> dict[str, float | int]:
        metrics: dict[str, float | int] = {
            "loss": float(result.loss),
            "lr": lr,
            "grad_norm": float(result.grad_norm),
            "tokens_seen": int(self._tokens_seen),
            "epoch": self._step * self._plan.global_batch_size / self._feed.num_sequences,
            "skipped_steps": int(self._skipped),
            "peak_memory_bytes": peak_memory_bytes(self._engine.device),
            **self._throughput.read(),
        }
        if self._loss_scale is not None:
            metrics["loss_scale"] = self._loss_scale.scale
        return metrics

    def _evaluate(self) -> None:
        if self._callbacks.evaluate is None:
            return
        self._pulse.enter("evaluation")
        metrics = self._callbacks.evaluate()
        self._callbacks.log({f"validation/{name}": value for name, value in metrics.items()}, self._step)
        self._throughput.restart()

    def _save(self) -> None:
        self._pulse.enter("save")
        self._callbacks.save(self.progress())
        self._throughput.restart()

    def _stop_if_asked(self, last_saved: int) -> None:
        """Once in a while, since every rank must hear of a signal, or a failed save, of any rank."""
        if self._is_finished or self._step % self._config.log_every_steps:
            return
        reason, has_failed = self._callbacks.stop_asked(), self._callbacks.has_save_failed()
        answers = self._collectives.all_gather((reason, has_failed))
        if any(failed for _, failed in answers):
            self._callbacks.settle()
        reasons = {reason for reason, _ in answers if reason is not None}
        if not reasons:
            return
        if last_saved != self._step:
            self._save()
        self._callbacks.settle()
        if "asked" in reasons:
            raise Preempted(f"Stopped at step {self._step} as asked; start again to go on from there.")
        if "drain" in reasons:
            raise Resized(f"Saved at step {self._step}, since a node is about to leave.")
        raise Resized(f"Saved at step {self._step}, to go on with another number of ranks.")

    def progress(self) -> Progress:
        """How far the run is; waits for the device, and for all ranks."""
        used = [interval for part in self._collectives.all_gather(self._ledger.take()) for interval in part]
        self._used, again = merged([*self._used, *used])
        self._used_again = merged([*self._used_again, *again])[0]
        return Progress(
            step=self._step,
            sequences_seen=self._step * self._plan.global_batch_size,
            used=self._used,
            used_again=self._used_again,
            tokens_seen=int(self._tokens_seen),
            skipped_steps=int(self._skipped),
            skipped_in_a_row=int(self._skipped_in_a_row),
            loss_scale=None if self._loss_scale is None else self._loss_scale.state_dict(),
        )


def _num_computed_tokens(micro_batches: list[Batch]) -> int:
    return sum(batch.input_ids.numel() for batch in micro_batches)
