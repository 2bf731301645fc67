"""Trains one phase of a run on this rank: builds its engine, its services and its loop."""

import torch

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.manifest import Progress
from distft.checkpoint.store import CheckpointStore
from distft.collectives import Collectives
from distft.config.step_function import value_at
from distft.engine.interface import DTYPES, Engine
from distft.model.transformer_config import TransformerConfig
from distft.optim.loss_scale import DynamicLossScale, LossScaleConfig
from distft.run.config import RunConfig
from distft.run.engines import build_engine
from distft.run.phases import PhaseSpan, lr_at
from distft.run.run_dir import RunRecord
from distft.run.run_inputs import RunInputs
from distft.run.services import RunServices
from distft.run.training_module import build_objective_context
from distft.topology import BatchPlan
from distft.train.early_stopping import EarlyStopping
from distft.train.experts import ExpertLoad
from distft.train.loop import Trainer
from distft.train.loss_probe import LossProbe
from distft.train.schedule import TrainingSchedule
from distft.train.services import StopRequested
from distft.train.throughput import Throughput, peak_flops_per_s
from distft.watch.watchdog import Watchdog


class PhaseRun:
    """One phase; a run without phases is a single one."""

    def __init__(
        self,
        inputs: RunInputs,
        span: PhaseSpan,
        run_config: RunConfig,
        *,
        plan: BatchPlan,
        collectives: Collectives,
        device: torch.device,
        store: CheckpointStore,
        record: RunRecord,
        watchdog: Watchdog,
        stop_requested: StopRequested,
    ) -> None:
        """`inputs` have the settings and parameters of `span`; `run_config` those of the run, to be saved."""
        self._inputs = inputs
        self._config = inputs.config
        self._span = span
        self._run_config = run_config
        self._plan = plan
        self._collectives = collectives
        self._device = device
        self._store = store
        self._record = record
        self._watchdog = watchdog
        self._stop_requested = stop_requested
        self.step = 0  # completed steps of the run
        self.saved_step: int | None = None  # the last one that is committed
        self.metrics: dict[str, float] = {}  # the last value of each name
        self.last_checkpoint: str | None = None  # the last one that this process committed

    def train(self, checkpoint: Checkpoint | None, progress: Progress, saved_step: int | None) -> Progress:
        """Train from `checkpoint`, or the beginning of the run, to the end of the phase, which is saved."""
        self.step, self.saved_step = progress.step, saved_step
        if self._config.phases:
            self._announce()
        engine = build_engine(self._inputs, checkpoint, self._plan, self._collectives, self._device)
        services, trainer = self._assemble(engine, checkpoint, progress)
        try:
            progress = trainer.run()
        except KeyboardInterrupt:
            raise  # without waiting for the save in progress
        except BaseException:
            services.close()  # the save in progress is valid
            raise
        finally:
            self.step, self.saved_step = trainer.step, services.last_saved_step
            engine.close()
        services.close()
        self.metrics, self.last_checkpoint = services.last_metrics, services.last_checkpoint
        return progress

    def _announce(self) -> None:
        numel = sum(torch.Size(self._inputs.shapes[name]).numel() for name in self._inputs.trainable)
        self._record.trackers.event(
            "phase",
            step=self.step,
            phase=f"{self._span.index + 1} of {len(self._config.phases)}",
            trainable_parameters=numel,
        )

    def _assemble(
        self, engine: Engine, checkpoint: Checkpoint | None, progress: Progress
    ) -> tuple[RunServices, Trainer]:
        config, inputs = self._config, self._inputs
        context = build_objective_context(
            inputs,
            self._plan,
            self._collectives,
            self._device,
            progress.objective_state,
            averaged_weights=engine.averaged_weights,
        )
        loss_probe = LossProbe(
            inputs.train, self._run_config.objective, config.engine, vocab_size=context.vocab_size
        )
        if checkpoint is not None:
            loss_probe.check(engine, checkpoint.manifest, checkpoint.path, self._collectives)
        services = RunServices(
            inputs,
            engine,
            run_config=self._run_config,
            store=self._store,
            last_saved_step=self.saved_step,
            loss_probe=loss_probe,
            record=self._record,
            watchdog=self._watchdog,
            context=context,
            stop_requested=self._stop_requested,
        )
        early_stopping = self._build_early_stopping(progress)
        if early_stopping.is_needed:
            early_stopping.require_metrics(services.sample_metrics())
        trainer = Trainer(
            engine=engine,
            objective=config.objective,
            context=context,
            feed=inputs.train,
            plan=self._plan,
            schedule=self._build_schedule(),
            progress=progress,
            services=services,
            throughput=self._build_throughput(),
            loss_scale=self._build_loss_scale(progress),
            dropout_seed=config.seed if inputs.has_dropout else None,
            attention_reach=inputs.model.attention_reach,
            early_stopping=early_stopping,
            experts=self._build_expert_load(),
        )
        return services, trainer

    def _build_schedule(self) -> TrainingSchedule:
        config, span = self._config, self._span
        total_steps, ema_decay = self._inputs.total_steps, config.optim.ema_decay
        return TrainingSchedule(
            total_steps=total_steps,
            stop_step=span.stop,
            lr_at=lambda step: lr_at(config, span, total_steps, step),
            log_every_steps=config.train.log_every_steps,
            max_skipped_in_a_row=config.train.max_skipped_in_a_row,
            max_skipped_share=config.train.max_skipped_share,
            save_every_steps=config.checkpoint.every_steps,
            evaluate_every_steps=config.evaluation.every_steps,
            evaluate_at_end=self._inputs.validation is not None,
            ema_decay_at=None if ema_decay is None else lambda step: value_at(ema_decay, step),
        )

    def _build_early_stopping(self, progress: Progress) -> EarlyStopping:
        phases = self._config.phases
        if not phases:
            return EarlyStopping(progress, of_run=self._config.train.early_stopping)
        return EarlyStopping(
            progress,
            of_run=self._config.train.early_stopping,
            of_phase=phases[self._span.index].until_stalled,
            phase_starts=progress.phase_starts or (0,),
            phase_stop=self._span.phase_stop if self._span.index + 1 < len(phases) else None,
        )

    def _build_expert_load(self) -> ExpertLoad | None:
        model = self._inputs.model
        if not isinstance(model, TransformerConfig) or model.experts is None:
            return None
        return ExpertLoad(model.experts, model.num_layers, self._inputs.trainable)

    def _build_throughput(self) -> Throughput:
        dtype = DTYPES[self._config.engine.param_dtype]
        return Throughput(
            flops=self._inputs.training_flops,
            recomputed_flops=(
                self._inputs.recomputed_flops
                if self._config.engine.activation_checkpointing == "full"
                and isinstance(self._inputs.model, TransformerConfig)
                else None
            ),
            peak_flops_per_s=lambda: peak_flops_per_s(self._device, dtype),
            world_size=self._collectives.world_size,
        )

    def _build_loss_scale(self, progress: Progress) -> DynamicLossScale | None:
        if self._config.engine.param_dtype != "fp16":
            return None
        loss_scale = LossScaleConfig().build(self._device)
        if progress.loss_scale is not None:
            loss_scale.load_state_dict(progress.loss_scale)
        return loss_scale
