"""Drives the workers of a run through Ray Train, which places them and replaces failed ones.

Ray makes the workers' process group, but transports no checkpoints: restarted workers resume from the last
commit in `run_dir`, as under any other launcher.
"""

import contextlib
import math
import secrets
import tempfile
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from ray.exceptions import RayError
from ray.train import FailureConfig, LoggingConfig, ScalingConfig, TrainingFailedError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig

from distft import storage
from distft.checkpoint.steps import committed_steps
from distft.cluster.connection import ray_connection
from distft.cluster.driver.failures import FailureCallback, explain
from distft.cluster.driver.reservations import stale_reservation_released
from distft.cluster.driver.resources import (
    describe_capacity,
    describe_request,
    node_resources,
    num_workers_that_fit,
    resources_per_worker,
)
from distft.cluster.driver.start_timeout import StartTimeout
from distft.cluster.mailbox import open_mailbox
from distft.cluster.paths import RunPaths
from distft.cluster.ray_internals import make_torch_trainer, worker_start_environment
from distft.cluster.worker import TrainFn, WorkerTask, run_worker
from distft.errors import ConfigError, Interrupted, LaunchError, StorageError
from distft.run.cluster_config import ClusterConfig
from distft.run.config import RunConfig
from distft.run.environment import RECORD_COLLECTIVES
from distft.run.train import RunResult, run_training

# For a while Ray still counts the resources of a dead node, so an attempt may wait for it in vain: end the
# attempt early, and start again on the remaining nodes.
_ELASTIC_START_ATTEMPT_S = 10.0
_NEVER_S = 1e9
_ABORT_TIMEOUT_S = 5.0
_HANG_REPORT_S = 20.0  # the time that ranks need to report a hang and to end


def train_on_ray(
    config: RunConfig, paths: RunPaths, environ: MutableMapping[str, str], train: TrainFn | None
) -> RunResult:
    """Train a checked configuration; raises the errors of `run_on_ray` that only a cluster can show."""
    with _connection(config, environ), _storage_marker(config) as marker:
        _check_capacity(config.cluster, is_local="RAY_ADDRESS" not in environ)
        return _train(config, paths, train or run_training, marker, environ)


def _connection(config: RunConfig, environ: MutableMapping[str, str]) -> AbstractContextManager[None]:
    cluster = config.cluster
    return ray_connection(
        environ,
        num_cpus=math.ceil(cluster.max_workers * cluster.cpus_per_worker),
        start_attempt_s=min(
            cluster.start_timeout_s, _ELASTIC_START_ATTEMPT_S if cluster.is_elastic else math.inf
        ),
        # Ranks watch each other and report more; this is for a single rank, and if all ranks hang at once.
        health_check_timeout_s=config.hang_timeout_s + _HANG_REPORT_S,
    )


@contextlib.contextmanager
def _storage_marker(config: RunConfig) -> Iterator[Path | None]:
    """A file in the checkpoint directory; workers that see it share that directory. None for a URL."""
    directory = storage.local_path(config.checkpoint.directory or config.run_dir)
    if directory is None:
        yield None
        return
    marker = directory / f".seen_by_all_{secrets.token_hex(4)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        raise ConfigError(
            f"The checkpoint directory {directory} cannot be written: {error.strerror}."
        ) from None
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)


def _train(
    config: RunConfig, paths: RunPaths, train: TrainFn, marker: Path | None, environ: Mapping[str, str]
) -> RunResult:
    cluster = config.cluster
    print(f"If this driver is killed, the same command goes on from the last checkpoint in {config.run_dir}.")
    checkpoints = config.checkpoint.directory or storage.join(config.run_dir, "checkpoints")
    with open_mailbox() as mailbox, tempfile.TemporaryDirectory(prefix="distft_ray_") as scratch:
        task = WorkerTask(
            config=config,
            train=train,
            mailbox=mailbox,
            working_dir=None if paths.is_uploaded else paths.working_dir,
            storage_marker=marker,
        )
        trainer = make_torch_trainer(
            partial(run_worker, task),
            torch_config=TorchConfig(
                backend="nccl" if cluster.gpus_per_worker > 0 else "gloo",
                timeout_s=math.ceil(config.timeout_s),
            ),
            scaling_config=_scaling_config(cluster),
            run_config=RayRunConfig(
                name=Path(config.run_dir).name,
                storage_path=scratch,  # Ray requires one for its own records; the run's are in run_dir
                # FailureCallback limits the failures, and StartTimeout the attempts to start.
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
                callbacks=[
                    FailureCallback(
                        mailbox,
                        max_failures=cluster.max_failures,
                        run_dir=config.run_dir,
                        checkpoints=checkpoints,
                    )
                ],
                worker_runtime_env={"env_vars": _worker_environment(config, environ)},
                logging_config=LoggingConfig(log_level="CRITICAL"),
            ),
        )
        start_timeout = StartTimeout(mailbox, cluster)
        try:
            with stale_reservation_released(config.run_dir), start_timeout.enforced():
                result: RunResult = trainer.fit().return_value
        except TrainingFailedError as error:
            raise explain(error, describe_request(cluster)) from None
        except KeyboardInterrupt:
            trainer.abort(_ABORT_TIMEOUT_S)
            raise (start_timeout.error or Interrupted(_describe_interruption(checkpoints))) from None
        except RayError as error:
            raise LaunchError(
                f"Ray Train's controller is gone ({type(error).__name__}): the run was interrupted, or the "
                "node of this driver failed. Start the run again: it resumes from its last checkpoint."
            ) from None
        return result


def _describe_interruption(checkpoints: str) -> str:
    try:
        step = max(committed_steps(checkpoints), default=None)
    except (StorageError, OSError):
        return "Interrupted. The same command goes on from the last checkpoint."
    if step is None:
        return "Interrupted. Nothing is saved yet: the same command starts anew."
    return f"Interrupted. Step {step} is saved: the same command goes on from there."


def _scaling_config(cluster: ClusterConfig) -> ScalingConfig:
    return ScalingConfig(
        num_workers=(cluster.min_workers, cluster.max_workers) if cluster.is_elastic else cluster.max_workers,
        use_gpu=cluster.gpus_per_worker > 0,
        resources_per_worker=resources_per_worker(cluster),
        accelerator_type=cluster.accelerator_type,
        placement_strategy=cluster.placement,
        # Ray would end the workers without a commit; StopMonitor lets them save first.
        elastic_resize_monitor_interval_s=_NEVER_S,
    )


def _check_capacity(cluster: ClusterConfig, *, is_local: bool) -> None:
    """Report at once if the run must wait for nodes. Raises `LaunchError` on a local Ray: it gets no more."""
    total, free = node_resources()
    each, num_needed = resources_per_worker(cluster), cluster.min_workers
    if num_workers_that_fit(each, free) >= num_needed:
        return
    is_only_busy = num_workers_that_fit(each, total) >= num_needed
    text = (
        f"Ray has {describe_capacity(total, free)}, too few{' free' if is_only_busy else ''} for "
        f"{describe_request(cluster)}"
    )
    if is_local and not is_only_busy:
        raise LaunchError(f"{text}: request less, or set RAY_ADDRESS to a larger cluster.")
    print(f"{text}: waiting up to {cluster.start_timeout_s:g} s for more.", flush=True)


def _worker_environment(config: RunConfig, environ: Mapping[str, str]) -> Mapping[str, str]:
    num_threads = config.num_threads or max(1, int(config.cluster.cpus_per_worker))
    env = {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # as `prepare_for_torch` does
        # torch and DeepSpeed emit deprecation warnings about each other, which users cannot act on.
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
        **worker_start_environment(environ),
    }
    if config.cluster.gpus_per_worker == 0:
        env["DS_ACCELERATOR"] = "cpu"
    else:
        env |= RECORD_COLLECTIVES
    if config.cluster.network_interface is not None:
        env["GLOO_SOCKET_IFNAME"] = env["NCCL_SOCKET_IFNAME"] = config.cluster.network_interface
    return {**env, **config.cluster.env}
