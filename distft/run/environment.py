"""Reads and completes the process's environment, once, before DeepSpeed reads it."""

import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distft.topology import Topology

# Has torch record when a GPU starts each collective of NCCL: a hung GPU is told from those that wait for it.
RECORD_COLLECTIVES = {"TORCH_NCCL_ENABLE_TIMING": "1", "TORCH_FR_BUFFER_SIZE": "2000"}


def prepare_for_torch() -> None:
    """Set how torch's threads on a CPU wait, and how many there are. Call it before torch is imported.

    Idle threads of OpenMP spin, and on a machine with other work they take the cores from those they wait
    for: a step took 20 to 40 times as long with two threads as with one. When they sleep instead, two threads
    were as fast as one there, and on an idle machine as fast as spinning ones. The number of threads is that
    of the cores that this process may use, shared among the ranks of its machine. What the environment sets
    already, as torchrun does, stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The names of torchrun and of deepspeed.
    num_ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // int(num_ranks))))


def usable_cores() -> int:
    """Physical cores that this process may use: by its affinity, and by the limit of its container."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = {
        _first_line(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") or n for n in allowed
    }
    quota, _, period = _first_line("/sys/fs/cgroup/cpu.max").partition(" ")
    limit = int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else len(siblings)
    return max(1, min(len(siblings), int(limit)))


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


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


def launch_name() -> str | None:
    """Names the launch that this process belongs to, if its launcher starts failed ranks again by itself.

    Ranks that torchrun starts again have the same name, those of another torchrun of the same run have not.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is None:
        return None
    # Of several nodes, another one may have rank 0 after a restart; torchrun needs an id of its own there.
    is_on_one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return f"{run_id} {socket.gethostname()} {os.getppid()}" if is_on_one_node else run_id


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
