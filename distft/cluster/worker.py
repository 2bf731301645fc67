"""Runs one rank in each worker of the cluster, by the same training function as any other launcher."""

import contextlib
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train

from distft.cluster.driver.reservations import record_reservation
from distft.cluster.mailbox import forward_output
from distft.cluster.paths import RUN_ROOT
from distft.cluster.stop_monitor import StopMonitor
from distft.errors import ConfigError, DistftError, StorageError, TrainingError
from distft.run.config import RunConfig
from distft.run.environment import resume_collector
from distft.run.train import RunResult
from distft.topology import Topology
from distft.train.services import StopRequested, never_stop

TrainFn = Callable[[RunConfig, Topology, StopRequested], RunResult]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerTask:
    """The task that the driver sends to each worker."""

    config: RunConfig
    train: TrainFn
    mailbox: Any  # a `Mailbox` actor
    working_dir: Path | None  # None: Ray has started the worker in its copy of the job's upload
    storage_marker: Path | None  # made by the driver beside the checkpoints; None: they are at a URL


def run_worker(task: WorkerTask) -> RunResult:
    """Train as one rank. Ray Train has made the process group and set torchrun's environment variables.

    Raises `DistftError` only: other classes may not unpickle on the driver, and would lose their traceback.
    """
    resume_collector()
    context = ray.train.get_context()
    topology = Topology(
        rank=context.get_world_rank(),
        local_rank=context.get_local_rank(),
        world_size=context.get_world_size(),
        is_distributed=True,
    )
    _prepare_node(task)
    task.mailbox.rank_joined.remote(topology.rank, ray.get_runtime_context().get_node_id())
    with contextlib.ExitStack() as stack:
        stop_requested: StopRequested = never_stop
        if topology.is_main:
            stack.enter_context(forward_output(task.mailbox))
            record_reservation(task.config.run_dir)
            monitor = StopMonitor(task.mailbox, task.config.cluster, topology.world_size)
            stop_requested = stack.enter_context(monitor).reason
        try:
            return task.train(task.config, topology, stop_requested)
        except DistftError:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}\n\n{traceback.format_exc().rstrip()}"
            raise TrainingError(text) from None


def _prepare_node(task: WorkerTask) -> None:
    """Change to the working directory, and check that this node sees the driver's directories."""
    problems = []
    if task.working_dir is not None:
        if task.working_dir.is_dir():
            os.chdir(task.working_dir)
        else:
            problems.append(
                f"Node {socket.gethostname()} has no {task.working_dir}, where relative paths start: "
                f"share it between the nodes, name another with {RUN_ROOT}, or submit it with the job."
            )
    if task.storage_marker is not None and not task.storage_marker.exists():
        directory = f"The checkpoint directory {task.storage_marker.parent}"
        if _has_ever_started(task.mailbox):  # the node saw it before, and may see it again
            raise StorageError(f"{directory} is no longer the driver's on node {socket.gethostname()}.")
        problems.append(
            f"{directory} is not the same directory on node {socket.gethostname()} and on the driver's: set "
            "run_dir to a directory that all nodes share, or checkpoint.directory to a URL."
        )
    if problems:
        raise ConfigError("\n".join(problems))


def _has_ever_started(mailbox: Any) -> bool:
    """Whether workers ever trained for this driver."""
    return bool(ray.get(mailbox.has_ever_started.remote()))
