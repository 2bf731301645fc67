"""Runs a configuration on a Ray cluster: checks it before Ray is imported, then trains."""

import contextlib
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distft.cluster.paths import RUN_ROOT, RunPaths
from distft.errors import ConfigError, DistftError
from distft.run import check
from distft.run.config import RunConfig, load_run_config
from distft.topology import Topology

if TYPE_CHECKING:
    from distft.cluster.worker import TrainFn
    from distft.run.train import RunResult


def run_on_ray(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    environ: MutableMapping[str, str],
    train: "TrainFn | None" = None,
) -> "RunResult":
    """Train on the cluster at `RAY_ADDRESS`, or on a local Ray that starts and ends with the run.

    Each worker calls `train`; None: `run_training`.

    `environ` is this process's environment; Ray's own settings are put into it. Rank 0's output is printed
    here. Raises `ConfigError`, `DataError` or `CheckpointError` before anything is scheduled, for errors that
    this machine can find; later the failed rank's error, `TrainingError` for one of an unknown class,
    `LaunchError` if workers do not start or die, `Preempted` if the run was asked to stop.
    """
    paths = RunPaths.find(environ, cwd=Path.cwd(), home=Path.home())
    config = _with_output_paths(load_run_config(config_path, overrides), paths)
    try:
        with contextlib.chdir(paths.working_dir):
            check_run(config)
        from distft.cluster.driver.ray_run import train_on_ray

        return train_on_ray(config, paths, environ, train)
    except DistftError as error:
        if error.exit_code != 2 or not paths.missing_file_hint():
            raise
        raise type(error)(f"{error}\n{paths.missing_file_hint()}") from None


def check_run(config: RunConfig) -> None:
    """Raise every error that can be found without a worker; reads the data's manifests as well."""
    gpus = config.cluster.gpus_per_worker
    if config.device == "cuda" and gpus == 0:
        raise ConfigError("device=cuda, but cluster.gpus_per_worker=0: set it to 1, or set device=cpu.")
    if config.device == "cpu" and gpus > 0:
        raise ConfigError(
            f"device=cpu, but cluster.gpus_per_worker={gpus:g}: set it to 0, or set device=cuda."
        )
    for world_size in sorted({config.cluster.min_workers, config.cluster.max_workers}):
        check.check_run(config, Topology(world_size=world_size))


def _with_output_paths(config: RunConfig, paths: RunPaths) -> RunConfig:
    """`config` with output paths that mean the same on every worker."""
    directory = config.checkpoint.directory
    if directory is not None:
        directory = paths.output_path(directory)
    changed = config.model_copy(
        update={
            "run_dir": paths.output_path(config.run_dir),
            "checkpoint": config.checkpoint.model_copy(update={"directory": directory}),
        }
    )
    if paths.is_uploaded and changed.run_dir != config.run_dir:
        print(f"run_dir is {changed.run_dir} on the nodes ({RUN_ROOT} chooses another root).", flush=True)
    return changed
