"""Reads and completes the process's environment, once, before DeepSpeed reads it."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

from distft.topology import Topology

# Has torch record when a GPU starts each collective of NCCL: a hung GPU is told from those that wait for it.
RECORD_COLLECTIVES = {"TORCH_NCCL_ENABLE_TIMING": "1", "TORCH_FR_BUFFER_SIZE": "2000"}


def configure_environment(device: str) -> Topology:
    """Read torchrun's variables, and set those that DeepSpeed needs. Call it before DeepSpeed is imported.

    `device` is the run's setting: auto, cpu or cuda. Raises `ConfigError` if only some of torchrun's
    variables are set.
    """
    topology = Topology.from_env(os.environ)
    os.environ.setdefault("LOCAL_RANK", str(topology.local_rank))  # DeepSpeed always needs it
    if device == "cpu" or (device == "auto" and not _finds_gpu()):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        for name, value in RECORD_COLLECTIVES.items():
            os.environ.setdefault(name, value)
    return topology


@contextmanager
def collector_paused() -> Iterator[None]:
    """For imports: within the block no garbage is collected, and later collections skip what it has made.

    Torch makes 400,000 objects that stay, and collecting among them takes a sixth of the import, 0.3 s.
    """
    gc.disable()
    try:
        yield
    finally:
        resume_collector()


def resume_collector() -> None:
    """Collect garbage again, but not among the objects that exist now."""
    gc.freeze()
    gc.enable()


def _finds_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
