"""The process's environment: read here, once, and handed down as a `Topology`."""

import os

import torch

from distft.topology import Topology


def enter_environment(device: str) -> Topology:
    """Where this process stands by torchrun's contract; tells DeepSpeed, which reads the environment itself.

    `device` is the run's setting: auto, cpu or cuda. Call it before anything imports DeepSpeed. Raises
    `ConfigError` for half an environment.
    """
    topology = Topology.from_env(os.environ)
    os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))  # read by DeepSpeed under no launcher too
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return topology
