"""What every worker of the cluster does: the same training as under any launcher."""

import contextlib
import os
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train

from distft.cluster.console import posted_to
from distft.cluster.orders import Orders
from distft.cluster.places import RUN_ROOT
from distft.cluster.reservations import remember_reservation
from distft.errors import ConfigError, DistftError, StorageError, TrainingError
from distft.run.config import RunConfig
from distft.run.train import Outcome
from distft.topology import Topology
from distft.train.loop import StopAsked, never_asked

Train = Callable[[RunConfig, Topology, StopAsked], Outcome]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What the driver sends to each worker."""

    config: RunConfig
    train: Train
    mailbox: Any  # where rank 0's output goes
    working_dir: Path | None  # None: Ray has put the worker into its copy of the job's upload
    witness: Path | None  # a file of the driver's beside the checkpoints; None: they are at a URL


def work(assignment: Assignment) -> Outcome:
    """Train as one rank. Ray Train has made the process group and set torchrun's environment.

    Raises errors of distft only: others may not survive the way to the driver, and their traceback does not.
    """
    context = ray.train.get_context()
    topology = Topology(
        rank=context.get_world_rank(),
        local_rank=context.get_local_rank(),
        world_size=context.get_world_size(),
        is_distributed=True,
    )
    _settle(assignment)
    assignment.mailbox.joined.remote(topology.rank, ray.get_runtime_context().get_node_id())
    with contextlib.ExitStack() as stack:
        stop_asked: StopAsked = never_asked
        if topology.is_main:
            stack.enter_context(posted_to(assignment.mailbox))
            remember_reservation(assignment.config.run_dir)
            orders = Orders(assignment.mailbox, assignment.config.cluster, topology.world_size)
            stop_asked = stack.enter_context(orders).reason
        try:
            return assignment.train(assignment.config, topology, stop_asked)
        except DistftError:
            raise
        except Exception as error:
            text = f"{type(error).__name__}: {error}\n\n{traceback.format_exc().rstrip()}"
            raise TrainingError(text) from None


def _settle(assignment: Assignment) -> None:
    """Stand where relative paths start, and see that this node shares what it has to share."""
    faults = []
    if assignment.working_dir is not None:
        if assignment.working_dir.is_dir():
            os.chdir(assignment.working_dir)
        else:
            faults.append(
                f"Node {socket.gethostname()} has no {assignment.working_dir}, where relative paths start: "
                f"share it between the nodes, name another with {RUN_ROOT}, or submit it with the job."
            )
    if assignment.witness is not None and not assignment.witness.exists():
        place = f"{assignment.witness.parent}, for checkpoints,"
        if _has_begun(assignment.mailbox):  # it was there, and may be again
            raise StorageError(f"{place} is not what it was on node {socket.gethostname()}.")
        faults.append(
            f"{place} is not the same directory on node {socket.gethostname()} and on the driver's: set "
            "run_dir to a place that all nodes share, or checkpoint.directory to a URL."
        )
    if faults:
        raise ConfigError("\n".join(faults))


def _has_begun(mailbox: Any) -> bool:
    """Whether workers ever trained for this driver."""
    return bool(ray.get(mailbox.has_begun.remote()))
