"""Reads and completes the process's environment, once, before DeepSpeed reads it."""

import os

import torch

from distft.topology import Topology


def configure_environment(device: str) -> Topology:
    """Read torchrun's variables, and set those that DeepSpeed needs. Call it before DeepSpeed is imported.

    `device` is the run's setting: auto, cpu or cuda. Raises `ConfigError` if only some of torchrun's
    variables are set.
    """
    topology = Topology.from_env(os.environ)
    os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))  # DeepSpeed always needs it
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return topology
