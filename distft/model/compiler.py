"""Whether torch.compile can run on this machine, and whether it pays for a run."""

import shutil
from importlib.util import find_spec

import torch

_CPP_COMPILERS = ("g++", "clang++", "c++")  # inductor's kernels for a CPU are C++
_C_COMPILERS = ("gcc", "clang", "cc")  # Triton builds a small C module for each kernel that it starts

# A CPU run of less than 10 minutes does not earn back the 10 to 30 s that two cores need to compile. The rate
# is a constant, not measured, so that a run takes the same decision, and so the same kernels, at every start.
_MIN_CPU_RUN_S = 600.0
_ASSUMED_CPU_FLOPS_PER_S = 100e9


def missing_for_compile(device: torch.device) -> str | None:
    """What torch.compile needs on `device` and this machine lacks, in words; None if it can run."""
    if device.type == "cuda":
        if find_spec("triton") is None:
            return "the package triton"
        return None if any(map(shutil.which, _C_COMPILERS)) else f"a C compiler ({', '.join(_C_COMPILERS)})"
    return None if any(map(shutil.which, _CPP_COMPILERS)) else f"a C++ compiler ({', '.join(_CPP_COMPILERS)})"


def compile_pays(device: torch.device, run_flops_per_rank: float) -> bool:
    """The decision of `engine.compile: auto` for a run that costs each rank `run_flops_per_rank` in all."""
    if missing_for_compile(device) is not None:
        return False
    return device.type == "cuda" or run_flops_per_rank >= _MIN_CPU_RUN_S * _ASSUMED_CPU_FLOPS_PER_S
