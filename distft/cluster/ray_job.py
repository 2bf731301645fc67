"""One run on a Ray cluster, from the driver's side.

Ray gives placement, a process group, and new workers for failed ones. It carries no checkpoints: workers
that start again find the last commit in `run_dir`, as under any launcher.
"""

import contextlib
import math
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from distft import storage
from distft.cluster.console import printed_mailbox
from distft.cluster.failures import FailureWatch, explain
from distft.cluster.places import RUN_ROOT, Places
from distft.cluster.reservations import reservation_of
from distft.cluster.room import nodes_now, resources_per_worker, room_for, there_is, wanted
from distft.cluster.tokens import ensure_token
from distft.cluster.waiting import Patience
from distft.cluster.worker import Assignment, Train, work
from distft.errors import ConfigError, DistftError, LaunchError
from distft.run.check import describe_run
from distft.run.cluster import ClusterConfig
from distft.run.config import RunConfig, load_run_config
from distft.run.train import Outcome, run_training

# Elastic: Ray may still count a node that has died a moment ago, so it does not wait long for its room.
_ELASTIC_ATTEMPT_S = 10.0
_NEVER_S = 1e9
_WATCH_ENDS_WITHIN_S = 20.0  # with what ranks take to tell of one that hangs, and to end
_OBJECT_STORE_BYTES = 100_000_000  # a configuration and some text pass through it; Ray's least is 75 MB


def run_on_ray(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    environ: MutableMapping[str, str],
    train: Train = run_training,
) -> Outcome:
    """Train on the cluster at `RAY_ADDRESS`, or on a Ray of this machine that lives as long as the run.

    `environ` is this process's environment; Ray's own settings are put into it. What rank 0 prints is
    printed here. Raises `ConfigError`, `DataError` or `CheckpointError` before anything is scheduled, where
    the fault can be seen from here; later what the failed rank raised, `TrainingError` for what nobody
    foresaw, `LaunchError` where workers cannot start or die, `Preempted` where they were asked to stop.
    """
    places = Places.find(environ, cwd=Path.cwd(), home=Path.home())
    config = _placed(load_run_config(config_path, overrides), places)
    try:
        with contextlib.chdir(places.working_dir):
            check(config)
        with _ray(config, environ), _witness(config) as witness:
            _check_room(config.cluster, is_local="RAY_ADDRESS" not in environ)
            return _fit(config, places, train, witness)
    except DistftError as error:
        if error.exit_code != 2 or not places.hint():
            raise
        raise type(error)(f"{error}\n{places.hint()}") from None


def check(config: RunConfig) -> None:
    """What can be said against the run before a worker exists; reads the data's manifests, too."""
    gpus = config.cluster.gpus_per_worker
    if config.device == "cuda" and gpus == 0:
        raise ConfigError("device=cuda, but cluster.gpus_per_worker=0: set it to 1, or set device=cpu.")
    if config.device == "cpu" and gpus > 0:
        raise ConfigError(
            f"device=cpu, but cluster.gpus_per_worker={gpus:g}: set it to 0, or set device=cuda."
        )
    for world_size in sorted({config.cluster.min_workers, config.cluster.max_workers}):
        for _ in describe_run(config, world_size):
            pass  # told by `distft config check`; here the complaints count


def _placed(config: RunConfig, places: Places) -> RunConfig:
    """With paths to write to that mean the same on every worker."""
    directory = config.checkpoint.directory
    if directory is not None:
        directory = places.outlasting(directory)
    placed = config.model_copy(
        update={
            "run_dir": places.outlasting(config.run_dir),
            "checkpoint": config.checkpoint.model_copy(update={"directory": directory}),
        }
    )
    if places.is_uploaded and placed.run_dir != config.run_dir:
        print(f"run_dir is {placed.run_dir} on the nodes ({RUN_ROOT} chooses another root).", flush=True)
    return placed


@contextlib.contextmanager
def _ray(config: RunConfig, environ: MutableMapping[str, str]) -> Iterator[None]:
    """A connection to the cluster; leaving the block closes it, and stops a Ray that was started for it."""
    cluster, address = config.cluster, environ.get("RAY_ADDRESS")
    if address and "://" in address and not address.startswith("ray://"):
        raise LaunchError(
            f"RAY_ADDRESS={address} is a dashboard's, which `distft submit` takes. A driver needs the "
            "cluster's own, such as head:6379, or auto on one of its nodes."
        )
    print(f"Connecting to Ray at {address}." if address else "Starting a Ray for this run.", flush=True)
    environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    attempt_s = min(cluster.start_timeout_s, _ELASTIC_ATTEMPT_S if cluster.is_elastic else math.inf)
    environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{attempt_s:g}")
    environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")  # its 2 s are half the time of a recovery
    environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process at every start; `Orders` looks
    # Ranks watch each other, and tell more; Ray sees the one that is alone, and where all hang.
    silent_s = config.hang_timeout_s + _WATCH_ENDS_WITHIN_S
    environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", f"{silent_s:g}")
    if not address:
        ensure_token(environ)
    environ.update(
        RAY_CHDIR_TO_TRIAL_DIR="0",  # relative paths keep their meaning
        RAY_TRAIN_METRICS_ENABLED="0",  # a run has trackers
        RAY_TRAIN_ENABLE_PRINT_PATCH="0",  # rank 0's output has a way of its own
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="1",  # without GPUs asked for, a worker sees none
    )
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            # A cluster that happens to run here is not the one that was meant, so "local" starts another.
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(cluster.max_workers * cluster.cpus_per_worker)),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"the Ray cluster at RAY_ADDRESS={address}" if address else "a Ray of this machine's own"
        raise LaunchError(f"Could not reach {where}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _witness(config: RunConfig) -> Iterator[Path | None]:
    """A file beside the checkpoints, by which workers know that they share them; None for a URL."""
    directory = storage.local_path(config.checkpoint.directory or config.run_dir)
    if directory is None:
        yield None
        return
    witness = directory / f".seen_by_all_{secrets.token_hex(4)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        witness.touch()
    except OSError as error:
        raise ConfigError(f"{directory}, for checkpoints, cannot be written: {error.strerror}.") from None
    try:
        yield witness
    finally:
        witness.unlink(missing_ok=True)


def _fit(config: RunConfig, places: Places, train: Train, witness: Path | None) -> Outcome:
    cluster = config.cluster
    has_gpus = cluster.gpus_per_worker > 0
    checkpoints = config.checkpoint.directory or storage.join(config.run_dir, "checkpoints")
    with printed_mailbox() as mailbox, tempfile.TemporaryDirectory(prefix="distft_ray_") as scratch:
        assignment = Assignment(
            config=config,
            train=train,
            mailbox=mailbox,
            working_dir=None if places.is_uploaded else places.working_dir,
            witness=witness,
        )
        trainer = _Trainer(
            partial(work, assignment),
            torch_config=TorchConfig(
                backend="nccl" if has_gpus else "gloo", timeout_s=math.ceil(config.timeout_s)
            ),
            scaling_config=_scaling(cluster),
            run_config=RayRunConfig(
                name=Path(config.run_dir).name,
                storage_path=scratch,  # Ray wants one for its own notes; the run's truth is in run_dir
                # Who counts is FailureWatch for failures, and Patience for starts that do not come about.
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
                callbacks=[
                    FailureWatch(
                        mailbox,
                        max_failures=cluster.max_failures,
                        run_dir=config.run_dir,
                        checkpoints=checkpoints,
                    )
                ],
                worker_runtime_env={"env_vars": _worker_environment(config)},
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
        patience = Patience(mailbox, cluster)
        try:
            with reservation_of(config.run_dir), patience.watching():
                outcome: Outcome = trainer.fit().return_value
        except TrainingFailedError as error:
            raise explain(error, wanted(cluster)) from None
        except (SystemExit, KeyboardInterrupt):  # what Ray Train's own handler of SIGINT ends in
            raise (patience.verdict or KeyboardInterrupt) from None
        except RayError as error:
            raise LaunchError(
                "The run was interrupted, or the node of this driver fails: Ray Train's controller is gone "
                f"({type(error).__name__}). Start the run again: it goes on from its last checkpoint."
            ) from None
        return outcome


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
    """Without Ray Data, for which Ray would start a process, and import much in each rank, at every start."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, DatasetsCallback)]


def _scaling(cluster: ClusterConfig) -> ScalingConfig:
    return ScalingConfig(
        num_workers=(cluster.min_workers, cluster.max_workers) if cluster.is_elastic else cluster.max_workers,
        use_gpu=cluster.gpus_per_worker > 0,
        resources_per_worker=resources_per_worker(cluster),
        accelerator_type=cluster.accelerator_type,
        placement_strategy=cluster.placement,
        # Ray would end the workers between two commits; ours save first, see `Orders`.
        elastic_resize_monitor_interval_s=_NEVER_S,
    )


def _check_room(cluster: ClusterConfig, *, is_local: bool) -> None:
    """Tell at once of a wait for nodes that may never come; on this machine alone, none will."""
    whole, free = nodes_now()
    each, least = resources_per_worker(cluster), cluster.min_workers
    if room_for(each, free) >= least:
        return
    is_enough = room_for(each, whole) >= least
    text = f"Ray has {there_is(whole, free)}, too few{' free' if is_enough else ''} for {wanted(cluster)}"
    if is_local and not is_enough:
        raise LaunchError(f"{text}: ask for less, or set RAY_ADDRESS to a cluster that has more.")
    print(f"{text}: waiting up to {cluster.start_timeout_s:g} s for more.", flush=True)


def _worker_environment(config: RunConfig) -> Mapping[str, str]:
    num_threads = config.num_threads or max(1, int(config.cluster.cpus_per_worker))
    env = {
        "OMP_NUM_THREADS": str(num_threads),
        # torch and DeepSpeed warn each other of deprecations that no user of ours can mend.
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    }
    if config.cluster.gpus_per_worker == 0:
        env["DS_ACCELERATOR"] = "cpu"
    if config.cluster.network_interface is not None:
        env["GLOO_SOCKET_IFNAME"] = env["NCCL_SOCKET_IFNAME"] = config.cluster.network_interface
    return {**env, **config.cluster.env}
