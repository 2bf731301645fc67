"""Train as a configuration says: on every rank, under whatever launcher."""

import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distft import storage
from distft.checkpoint.background import Saver
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.comparison import check_whole
from distft.checkpoint.manifest import Progress
from distft.checkpoint.store import CheckpointStore
from distft.collectives import Collectives, ProcessGroup, together
from distft.config import dump_yaml, redact
from distft.engine.interface import DTYPES, Engine
from distft.errors import CheckpointError, ConfigError, Preempted, SupersededError
from distft.model.counts import training_flops_per_token
from distft.optim.loss_scale import DynamicLossScale, LossScaleConfig
from distft.run.check import read_checked
from distft.run.config import RunConfig, check_resumable
from distft.run.engines import build_engine, choose_device, join_ranks
from distft.run.inputs import Inputs, state_source
from distft.run.saving import draft
from distft.topology import BatchPlan, Topology
from distft.tracker import LEDGER, Trackers, build_trackers
from distft.train.evaluation import evaluate
from distft.train.loop import Callbacks, StopAsked, Trainer, every, never_asked
from distft.train.probe import Probe
from distft.train.throughput import Throughput, peak_flops_per_s
from distft.watch.watch import Watch

CONFIG_FILE = "config.yaml"
_PROBE_SEQUENCES = 4
_LEAST_WATCHED_STEPS = 10  # over which ranks are compared, to find slow ones


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished run has to say for itself, on every rank."""

    step: int
    metrics: Mapping[str, float]  # the last ones of each name, validation's under validation/
    checkpoint: str | None  # the last one of this process; None where nothing was left to do


def run_training(config: RunConfig, topology: Topology, stop_asked: StopAsked = never_asked) -> Outcome:
    """Train from wherever the run stands to its end, on this rank.

    Every fault of configuration and data is raised before a device is used. Raises `Preempted` after a
    SIGTERM, or where `stop_asked` of any rank gives a reason, once the state is saved.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    plan, inputs = read_checked(config, topology)
    device = choose_device(config, topology)
    collectives = join_ranks(config, topology, device)
    try:
        watch = Watch(
            collectives,
            Path(config.run_dir),
            heartbeat_s=config.heartbeat_s,
            hang_timeout_s=config.hang_timeout_s,
            interval_steps=max(config.train.log_every_steps, _LEAST_WATCHED_STEPS),
        )
        with watch:
            return _Run(inputs, plan, collectives, device, watch=watch, stop_asked=stop_asked).train()
    finally:
        if isinstance(collectives, ProcessGroup):
            collectives.close()


class _Run:
    """One process's part of one run: assembles the parts, and stands between the loop and the disk."""

    def __init__(
        self,
        inputs: Inputs,
        plan: BatchPlan,
        collectives: Collectives,
        device: torch.device,
        *,
        watch: Watch,
        stop_asked: StopAsked,
    ) -> None:
        self._inputs = inputs
        self._stop_asked = stop_asked
        self._config = inputs.config
        self._plan = plan
        self._collectives = collectives
        self._device = device
        self._watch = watch
        directory = self._config.checkpoint.directory or storage.join(self._config.run_dir, "checkpoints")
        # The saver's thread talks to those of other ranks while this thread and the engine talk to theirs.
        self._store = CheckpointStore(directory, collectives.twin())
        self._saver = Saver(self._store, self._config.checkpoint)
        self._probe = Probe(inputs.train, self._config.objective, self._config.engine.param_dtype)
        self._total_steps = self._config.train.total_steps(
            num_sequences=inputs.train.num_sequences, global_batch_size=plan.global_batch_size
        )
        self._trackers = Trackers()
        self._last_metrics: dict[str, float] = {}
        self._last_checkpoint: str | None = None
        self._run_id = ""
        self._used_by_step: dict[int, dict[str, Any]] = {}  # of saves that are under way

    def train(self) -> Outcome:
        resumed, complaints = self._find_resume()
        progress = Progress() if resumed is None else resumed.manifest.progress
        self._open_run_dir(resumed, complaints)
        status = "failed"
        try:
            if progress.step < self._total_steps:
                self._store.claim()
                progress = self._train_from(progress, resumed)
            else:
                is_beyond = progress.step > self._total_steps
                reason = {"reason": "the run is already beyond its last step"} if is_beyond else {}
                self._trackers.event(
                    "nothing_to_do", step=progress.step, total_steps=self._total_steps, **reason
                )
            status = "completed"
        except Preempted:
            status = "preempted"
            raise
        except SupersededError as error:
            self._trackers.event("superseded", reason=str(error))
            status = "superseded"
            raise
        finally:
            self._trackers.finish(status)
        return Outcome(step=progress.step, metrics=self._last_metrics, checkpoint=self._last_checkpoint)

    def _find_resume(self) -> tuple[Checkpoint | None, list[str]]:
        resumed, complaints = self._store.newest_good()
        if resumed is None and complaints:
            raise CheckpointError(
                f"No checkpoint in {self._store.root} is whole, so the run cannot go on. Put one back, "
                "choose another run_dir, or delete them to start afresh.\n" + "\n".join(complaints)
            )
        if resumed is None:
            self._check_init_from()
            return None, complaints
        if not self._config.checkpoint.resume:
            raise ConfigError(
                f"checkpoint.resume is false, but {self._store.root} holds a run at step {resumed.step}: "
                "choose another run_dir, delete this one, or let the run go on."
            )
        check_resumable(resumed.manifest.config, self._config)
        return resumed, complaints

    def _check_init_from(self) -> None:
        """Every byte, as before a resume; ranks share the files of a checkpoint of ours."""
        source = self._inputs.init_from
        if isinstance(source, Checkpoint):
            source.verify(self._collectives)
        elif source is not None:
            with together(self._collectives, CheckpointError):
                if self._collectives.rank == 0:
                    check_whole(source)

    def _open_run_dir(self, resumed: Checkpoint | None, complaints: list[str]) -> None:
        run_id = secrets.token_hex(4) if resumed is None else resumed.manifest.run_id
        self._run_id = self._collectives.broadcast(run_id)
        with together(self._collectives, ConfigError):
            if self._collectives.rank == 0:
                run_dir = Path(self._config.run_dir)
                run_dir.mkdir(parents=True, exist_ok=True)
                storage.commit_bytes(run_dir / CONFIG_FILE, dump_yaml(self._config).encode())
                self._trackers = build_trackers(self._config.trackers, max_steps=self._total_steps)
                self._trackers.start(
                    self._run_id,
                    self._config.model_dump(mode="json"),
                    run_dir,
                    resume_step=None if resumed is None else resumed.step,
                )
        for complaint in complaints:
            self._trackers.event("damaged_checkpoint", reason=complaint)
        self._trackers.event(
            "start" if resumed is None else "resume",
            step=0 if resumed is None else resumed.step,
            world_size=self._collectives.world_size,
            engine=self._config.engine.type,
            device=str(self._device),
            **self._origin(resumed),
        )
        if resumed is not None:
            self._trackers.event(LEDGER, step=resumed.step, **_used(resumed.manifest.progress))
        before = None if resumed is None else resumed.manifest.written_by.get("world_size")
        if before not in {None, self._collectives.world_size}:
            self._trackers.event("resize", before=before, after=self._collectives.world_size)

    def _origin(self, resumed: Checkpoint | None) -> dict[str, Any]:
        """For the record: where weights come from, and which settings are others than at the save."""
        if resumed is None:
            start = self._inputs.init_from
            return {} if start is None else {"init_from": start.path}
        before, now = resumed.manifest.config, redact(self._config.model_dump(mode="json"))
        changed = sorted(
            f"{section}.{key}"
            for section in ("optim", "train", "engine", "batch")
            for key in {*before.get(section, {}), *now[section]}
            if before.get(section, {}).get(key) != now[section].get(key)
        )
        return {"changed": ", ".join(changed)} if changed else {}

    def _train_from(self, progress: Progress, resumed: Checkpoint | None) -> Progress:
        config, inputs = self._config, self._inputs
        engine = build_engine(
            inputs, state_source(inputs, resumed), self._plan, self._collectives, self._device
        )
        if resumed is not None:
            self._probe.check(engine, resumed.manifest, resumed.path, self._collectives)
        with stop_on_sigterm() as is_terminated:
            trainer = Trainer(
                engine=engine,
                objective=config.objective,
                feed=inputs.train,
                plan=self._plan,
                lr_at=lambda step: config.optim.lr(step, self._total_steps),
                total_steps=self._total_steps,
                config=config.train,
                callbacks=Callbacks(
                    log=self._log,
                    save=lambda now: self._save(engine, now),
                    has_save_failed=lambda: self._saver.has_failed,
                    settle=self._settle,
                    evaluate=None if inputs.validation is None else lambda: self._evaluate(engine),
                    stop_asked=lambda: "asked" if is_terminated() else self._stop_asked(),
                ),
                collectives=self._collectives,
                throughput=self._throughput(),
                progress=progress,
                save_due=every(config.checkpoint.every_steps),
                evaluation_due=every(config.evaluation.every_steps),
                loss_scale=self._loss_scale(progress),
                dropout_seed=config.seed if inputs.model.dropout > 0 else None,
                pulse=self._watch.pulse,
            )
            try:
                return trainer.run()
            finally:
                # Whatever ended the run, the state that is being written is good.
                self._saver.join()
                self._tell_saved()
                engine.close()

    def _throughput(self) -> Throughput:
        dtype = DTYPES[self._config.engine.param_dtype]
        return Throughput(
            flops_per_token=training_flops_per_token(
                self._inputs.model, self._plan.seq_len, self._inputs.head
            ),
            peak_flops_per_s=peak_flops_per_s(self._device, dtype),
            world_size=self._collectives.world_size,
        )

    def _loss_scale(self, progress: Progress) -> DynamicLossScale | None:
        if self._config.engine.param_dtype != "fp16":
            return None
        loss_scale = LossScaleConfig().build()
        if progress.loss_scale is not None:
            loss_scale.load_state_dict(progress.loss_scale)
        return loss_scale

    def _log(self, metrics: Mapping[str, float | int], step: int) -> None:
        self._last_metrics.update(metrics)
        self._trackers.log(metrics, step=step)
        for straggler, member in self._watch.collect():
            self._trackers.event(
                "straggler",
                step=step,
                rank=straggler.rank,
                host=member.host,
                pid=member.pid,
                own_s=round(straggler.own_s, 4),
                others_own_s=round(straggler.others_own_s, 4),
            )

    def _evaluate(self, engine: Engine) -> dict[str, float]:
        assert self._inputs.validation is not None
        settings = self._config.evaluation
        return evaluate(
            engine.model,
            engine.module,
            self._config.objective,
            self._inputs.validation,
            micro_batch_size=settings.micro_batch_size or self._plan.micro_batch_size,
            seq_len=self._plan.seq_len,
            collectives=self._collectives,
            device=self._device,
            max_sequences=settings.max_sequences,
        )

    def _save(self, engine: Engine, progress: Progress) -> None:
        self._used_by_step[progress.step] = _used(progress)
        probe = self._probe.measure(engine, min(_PROBE_SEQUENCES, self._plan.micro_batch_size))
        self._saver.save(
            draft(
                self._inputs,
                engine,
                progress,
                probe,
                run_id=self._run_id,
                world_size=self._collectives.world_size,
            )
        )
        self._tell_saved()

    def _settle(self) -> None:
        try:
            self._saver.wait()
        finally:
            self._tell_saved()

    def _tell_saved(self) -> None:
        for saved in self._saver.collect():
            self._last_checkpoint = saved.path
            self._trackers.event(
                "save",
                step=saved.step,
                path=saved.path,
                stall_s=round(saved.stall_s, 3),
                write_s=round(saved.write_s, 3),
            )
            self._trackers.event(LEDGER, step=saved.step, **self._used_by_step.pop(saved.step))


def _used(progress: Progress) -> dict[str, Any]:
    """For an audit."""
    return {
        "sequences_seen": progress.sequences_seen,
        "used": progress.used,
        "used_again": progress.used_again,
    }


@contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Within the block SIGTERM only sets what the yielded function returns.

    Handlers can be set in a process's main thread alone; elsewhere (a Ray worker) nothing changes.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.set())  # noqa: ARG005
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
