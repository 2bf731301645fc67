"""A worker process of `gpu_check.py`: imports what the phases need, and serves one of them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from gpu_check_device import Device
from gpu_check_parity import compiled_parity_cases, model_parity_cases, parity_cases
from gpu_check_product import Session
from gpu_check_ranks import rank_cases
from gpu_check_resume import resume_cases
from gpu_check_speed import machine_cases, more_speed_cases, speed_cases
from gpu_check_step import generation_cases, profile_cases, sync_cases
from gpu_check_worker import Case, Request, serve

from distft.run.environment import configure_environment

PHASES: Mapping[str, Callable[[Session], Sequence[Case]]] = {
    "machine": machine_cases,
    "parity": parity_cases,
    "parity-models": model_parity_cases,
    "speed": speed_cases,
    "sync": sync_cases,
    "resume": resume_cases,
    "profile": profile_cases,
    "parity-compiled": compiled_parity_cases,
    "generation": generation_cases,
    "two-ranks": rank_cases,
    "speed-more": more_speed_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true")
    dry: bool = parser.parse_args().dry
    device = Device.choose(dry=dry)
    configure_environment(device.kind)
    if dry:
        torch.set_num_threads(1)  # more are slower in such sizes, most of all on a busy machine
    import distft.engine.zero  # noqa: F401  # takes seconds, and reads the environment

    def bind(make_cases: Callable[[Session], Sequence[Case]]) -> Callable[[Request], Sequence[Case]]:
        return lambda request: make_cases(Session(device, Path(request.work_dir), request.dry))

    phases = {name: bind(make_cases) for name, make_cases in PHASES.items()}
    serve(phases, device.needs_new_process)


if __name__ == "__main__":
    main()
