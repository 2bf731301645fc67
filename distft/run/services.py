"""A run's services for the training loop: metrics and events, evaluation, saves, stop requests."""

import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import distft
from distft.checkpoint.background import CheckpointSaver, SaveResult
from distft.checkpoint.manifest import GroupRecord, ProbeRecord, Progress, TokenizerRecord
from distft.checkpoint.snapshot import CheckpointSnapshot, ParameterInfo, RunMetadata
from distft.checkpoint.staging import copier_from
from distft.checkpoint.store import CheckpointStore
from distft.config import redact
from distft.data.dataset import Labels
from distft.engine.interface import Engine
from distft.objective.interface import ObjectiveContext
from distft.optim.groups import parameter_groups
from distft.optim.patterns import is_moved_by_rule
from distft.run.config import RunConfig
from distft.run.evaluation_record import classifier_records
from distft.run.run_dir import RunRecord, ledger_fields
from distft.run.run_inputs import RunInputs
from distft.run.samples import generate_samples
from distft.tracker import LEDGER_EVENT
from distft.train.evaluation import evaluate
from distft.train.loss_probe import LossProbe
from distft.train.services import Metrics, StopReason, StopRequested, TrainerServices
from distft.watch.watchdog import Watchdog

_PROBE_SEQUENCES = 4


class RunServices(TrainerServices):
    """One rank's `TrainerServices`."""

    def __init__(
        self,
        inputs: RunInputs,
        engine: Engine,
        *,
        run_config: RunConfig,
        store: CheckpointStore,
        last_saved_step: int | None,
        loss_probe: LossProbe,
        record: RunRecord,
        watchdog: Watchdog,
        context: ObjectiveContext,
        stop_requested: StopRequested,
    ) -> None:
        """`inputs` are those of a phase of the run, and `run_config` has the settings of the run."""
        self.heartbeat = watchdog.heartbeat
        self.last_metrics: dict[str, float] = {}  # the last value of each name
        self.last_checkpoint: str | None = None  # the last one committed by this process
        self.last_saved_step = last_saved_step  # the last commit's; None without one
        self._inputs = inputs
        self._config = run_config
        self._engine = engine
        self._saver = CheckpointSaver(
            store, self._config.checkpoint, copier_from(engine.device), self._log_commit
        )
        self._loss_probe = loss_probe
        self._run_id = record.run_id
        self._trackers = record.trackers
        self._watchdog = watchdog
        self._context = context
        self._stop_requested = stop_requested
        self._saving: dict[int, Progress] = {}  # by step, of saves that are not known to be committed

    def log(self, metrics: Metrics, step: int) -> None:
        self.last_metrics.update(metrics)
        self._trackers.log(metrics, step=step)
        for straggler, process in self._watchdog.take_stragglers():
            self._trackers.event(
                "straggler",
                step=step,
                rank=straggler.rank,
                host=process.host,
                pid=process.pid,
                own_s=round(straggler.own_s, 4),
                others_own_s=round(straggler.others_own_s, 4),
            )

    def evaluate(self, step: int) -> Metrics:
        sums: dict[str, Tensor] = {}
        metrics = self._evaluate(self._config.evaluation.max_sequences, on_sums=sums.update)
        record: dict[str, Any] = {}
        samples = self._samples()  # on all ranks
        if self._context.collectives.rank == 0 and (classifiers := classifier_records(self._inputs, sums)):
            record["classifiers"] = classifiers
        if samples:
            record["samples"] = samples
        if record:
            self._trackers.show(record, step=step)
        return metrics

    def _samples(self) -> list[dict[str, str]]:
        """The texts of this evaluation; none without `evaluation.samples`."""
        settings, inputs, engine = self._config.evaluation.samples, self._inputs, self._engine
        if settings is None or inputs.tokenizer is None:
            return []
        return generate_samples(
            settings,
            inputs.tokenizer,
            document_start=inputs.train.document_start,
            model=engine.model,
            module=engine.module,
            device=engine.device,
        )

    def sample_metrics(self) -> Metrics:
        """Metrics of a few validation sequences, for their names."""
        return self._evaluate(self._config.batch.micro_batch_size * self._context.collectives.world_size)

    def _evaluate(
        self, max_sequences: int | None, on_sums: Callable[[Mapping[str, Tensor]], None] = lambda _: None
    ) -> Metrics:
        assert self._inputs.validation is not None  # otherwise no evaluation is due
        settings, batch = self._config.evaluation, self._config.batch
        return evaluate(
            self._engine.model,
            self._engine.module,
            self._config.objective,
            self._inputs.validation,
            context=self._context,
            micro_batch_size=settings.micro_batch_size or batch.micro_batch_size,
            seq_len=batch.seq_len,
            device=self._engine.device,
            max_sequences=max_sequences,
            on_sums=on_sums,
        )

    def save(self, progress: Progress) -> None:
        num_sequences = min(_PROBE_SEQUENCES, self._config.batch.micro_batch_size)
        probe = self._loss_probe.measure(self._engine, num_sequences)
        self._saving[progress.step] = progress
        self._saver.save(self._take_snapshot(progress, probe))
        self._log_cleanup_problems()

    def before_update(self) -> None:
        self._saver.hold_update()

    def wait_for_saves(self) -> None:
        self._saver.wait()
        self._log_cleanup_problems()

    def has_failed_save(self) -> bool:
        return self._saver.has_failed

    def stop_requested(self) -> StopReason | None:
        return self._stop_requested()

    def close(self) -> None:
        """Complete the save in progress; if it fails, raise nothing."""
        self._saver.join()
        self._log_cleanup_problems()

    def _log_commit(self, saved: SaveResult) -> None:
        """Log a commit, in the thread that wrote it: the process may be killed at any time after it."""
        self.last_checkpoint, self.last_saved_step = saved.path, saved.step
        self._trackers.event(
            "save",
            step=saved.step,
            path=saved.path,
            stall_s=round(saved.stall_s, 3),
            write_s=round(saved.write_s, 3),
        )
        progress = self._saving.pop(saved.step)
        self._trackers.event(LEDGER_EVENT, step=saved.step, **ledger_fields(progress))

    def _log_cleanup_problems(self) -> None:
        for saved in self._saver.collect():
            if saved.cleanup_problem:
                self._trackers.event("cleanup_failed", step=saved.step, reason=saved.cleanup_problem)

    def _take_snapshot(self, progress: Progress, probe: ProbeRecord) -> CheckpointSnapshot:
        """The state and metadata that this rank saves.

        The fragments are views of live state: copy or write them at once.
        """
        inputs = self._inputs
        updates = self._engine.updates()
        return CheckpointSnapshot(
            progress=progress,
            fragments=list(self._engine.fragments()),
            parameters={
                name: ParameterInfo(
                    shape, name in inputs.trainable, updates.get(name, 0), is_buffer=is_moved_by_rule(name)
                )
                for name, shape in inputs.shapes.items()
            },
            metadata=RunMetadata(
                run_id=self._run_id,
                config=dict(redact(self._config.model_dump(mode="json"))),
                label_names=_as_json(inputs.label_names),
                tokenizer=_tokenizer_record(inputs),
                written_by=self._written_by(),
                groups=_group_records(inputs, updates),
                tied=_tied_names(self._engine.module),
                probe=probe,
                data_fingerprint=inputs.train.fingerprint,
            ),
            attachments={} if inputs.tokenizer is None else inputs.tokenizer.files(),
        )

    def _written_by(self) -> dict[str, Any]:
        engine = self._config.engine
        return {
            "distft": distft.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "engine": engine.type,
            "zero_stage": getattr(engine, "zero_stage", None),
            "param_dtype": engine.param_dtype,
            "world_size": self._context.collectives.world_size,
        }


def _tokenizer_record(inputs: RunInputs) -> TokenizerRecord | None:
    if inputs.tokenizer is None:
        return None
    return TokenizerRecord(
        fingerprint=inputs.tokenizer.fingerprint,
        file=inputs.tokenizer.file_name,
        document_start=inputs.train.document_start,
    )


def _as_json(label_names: Labels) -> list[str] | dict[str, list[str]] | None:
    if isinstance(label_names, Mapping):
        return {stream: list(names) for stream, names in label_names.items()}
    return None if label_names is None else list(label_names)


def _group_records(inputs: RunInputs, updates: Mapping[str, int]) -> list[GroupRecord]:
    """The optimizer's parameter groups, with peak learning rates."""
    optim, widths = inputs.config.optim, inputs.model.widths(inputs.shapes)
    return [
        GroupRecord(
            parameters=group.names,
            settings={
                "lr": optim.peak_lr * group.lr_scale,
                "weight_decay": group.weight_decay,
                **optim.group_settings(group),
            },
        )
        for group in parameter_groups(inputs.shapes, inputs.trainable, optim, updates, widths)
    ]


def _tied_names(module: torch.nn.Module) -> dict[str, str]:
    """The other names of tied parameters: name -> the name that the parameter is saved under."""
    saved_names = {id(param): name for name, param in module.named_parameters()}
    all_names = module.named_parameters(remove_duplicate=False)
    return {name: saved_names[id(param)] for name, param in all_names if saved_names[id(param)] != name}
