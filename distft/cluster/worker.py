"""What every worker of the cluster does: the same training as under any launcher."""

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train

from distft.cluster.console import posted_to
from distft.cluster.places import RUN_ROOT
from distft.errors import ConfigError
from distft.run.config import RunConfig
from distft.run.train import Outcome
from distft.topology import Topology

Train = Callable[[RunConfig, Topology], Outcome]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What the driver sends to each worker."""

    config: RunConfig
    train: Train
    mailbox: Any  # where rank 0's output goes
    working_dir: Path | None  # None: Ray has put the worker into its copy of the job's upload
    witness: Path | None  # a file of the driver in run_dir, which every node must see; None: run_dir is a URL


def work(assignment: Assignment) -> Outcome:
    """Train as one rank. Ray Train has made the process group and set torchrun's environment."""
    context = ray.train.get_context()
    topology = Topology(
        rank=context.get_world_rank(),
        local_rank=context.get_local_rank(),
        world_size=context.get_world_size(),
        is_distributed=True,
    )
    _settle(assignment)
    shown = posted_to(assignment.mailbox) if topology.is_main else contextlib.nullcontext()
    with shown:
        return assignment.train(assignment.config, topology)


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
        faults.append(
            f"run_dir={assignment.config.run_dir} on node {socket.gethostname()} is not the directory that the "
            "driver sees: give a run_dir on storage that all nodes share, or a URL."
        )
    if faults:
        raise ConfigError("\n".join(faults))
