"""Phases `sync`, `profile` and `generation` of `gpu_check.py`: where steps wait and what takes their time."""

import json
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_check_device import require_no_synchronisation, synchronisations
from gpu_check_parity import small_batch, small_model
from gpu_check_product import Session, Training, run_config
from gpu_check_speed import MAX_ROWS, MODELS
from gpu_check_worker import Case, CheckError, Row
from torch.profiler import ProfilerActivity, profile

from distft.model.generation import generate

KERNELS_FILE = "kernels.jsonl"
_WARM_UP_STEPS = 3
_NUM_SITES = 12


def sync_cases(session: Session) -> list[Case]:
    """A step of `local` waits for nothing; those of ZeRO are counted."""
    cases = []
    for precision in ("fp32", "bf16", "fp16"):
        for packed in (False, True):
            local: dict[str, Any] = {"type": "local", "param_dtype": precision, "compile": False}
            run = partial(count_waits, session, local, packed=packed, allowed=0)
            cases.append(Case(f"local {precision} {'packed' if packed else 'plain'}", run, 45))
    for precision in ("bf16", "fp32"):
        for stage in range(4):
            zero = {"type": "zero", "zero_stage": stage, "param_dtype": precision, "compile": False}
            run = partial(count_waits, session, zero, packed=False, allowed=None)
            cases.append(Case(f"zero {stage} {precision} plain", run, 45))
    return cases


def count_waits(session: Session, engine: Mapping[str, Any], *, packed: bool, allowed: int | None) -> Row:
    """Where one step waits for the device. Raises `CheckError` above `allowed` waits."""
    config = run_config(
        session.data,
        session.work_dir / "sync",
        session.device.kind,
        model=small_model(session),
        batch=small_batch(session),
        engine=engine,
        packed=packed,
    )
    with Training(config, session.collectives(config)) as training:
        for _ in range(_WARM_UP_STEPS):
            training.step()
        session.device.synchronize()
        waits = synchronisations(session.device, training.step)
        values = {
            "waits_per_step": len(waits),
            "sites": [f"{site} ({n}x)" for site, n in Counter(waits).most_common(_NUM_SITES)],
        }
        if allowed is not None and len(waits) > allowed:
            raise CheckError(f"a step waits {len(waits)} times for the device", **values)
        if allowed == 0:
            require_no_synchronisation(session.device, training.step)
    return values


def profile_cases(session: Session) -> list[Case]:
    """Kernels by time of one step, into a file."""
    local: dict[str, Any] = {"type": "local"}
    zero = {"type": "zero", "zero_stage": 1}
    eager, compiled = {"compile": False}, {"compile": True}
    if session.dry:
        steps = {"tiny local eager": ("tiny", local | eager, True)}
    else:
        steps = {
            "124M local compiled": ("124M", local | compiled, False),
            "1.3B local compiled": ("1.3B", local | compiled, False),
            "1.3B zero 1 compiled": ("1.3B", zero | compiled, False),
            "1.3B local compiled packed": ("1.3B", local | compiled, True),
            "1.3B local eager": ("1.3B", local | eager, False),
        }
    return [
        Case(label, partial(profile_step, session, label, name, engine, packed=packed), 60)
        for label, (name, engine, packed) in steps.items()
    ]


def profile_step(session: Session, label: str, name: str, engine: Mapping[str, Any], *, packed: bool) -> Row:
    """Profile one step in bf16, with the rows that `speed` measures."""
    model, device = MODELS[name], session.device
    rows = MAX_ROWS[name]
    config = run_config(
        session.data,
        session.work_dir / "profile",
        device.kind,
        model=model,
        batch=(rows, rows, model.max_seq_len),
        engine={"param_dtype": "bf16", **engine},
        packed=packed,
    )
    with Training(config, session.collectives(config), quick_weights=True) as training:
        for _ in range(_WARM_UP_STEPS):
            training.step()
        step_s = device.seconds_per_step(training.step, turns=2, steps=2)
        activities = [ProfilerActivity.CUDA] if device.is_cuda else [ProfilerActivity.CPU]
        with profile(activities=activities) as recorded:
            training.step()
            device.synchronize()
    kernels = kernels_by_time(recorded, is_cuda=device.is_cuda)
    _append_kernels(session.work_dir / KERNELS_FILE, label, kernels)
    busy_s = sum(kernel["total_us"] for kernel in kernels) / 1e6
    return {
        "model": name,
        "step_s": round(step_s, 5),
        "kernels_s": round(busy_s, 5),
        "busy_share": round(busy_s / step_s, 3),
        "num_launches": sum(kernel["calls"] for kernel in kernels),
        "top": [f"{kernel['name'][:60]} {kernel['share']:.1%}" for kernel in kernels[:8]],
    }


def kernels_by_time(recorded: Any, *, is_cuda: bool) -> list[dict[str, Any]]:
    """Each kernel (on a CPU: operation) with its calls, total time and share, the longest first."""
    attribute = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    times = [(event, float(getattr(event, attribute))) for event in recorded.key_averages()]
    total_us = sum(time_us for _, time_us in times) or 1.0
    kernels = [
        {
            "name": event.key,
            "calls": event.count,
            "total_us": round(time_us, 1),
            "share": round(time_us / total_us, 5),
        }
        for event, time_us in times
        if time_us > 0
    ]
    return sorted(kernels, key=lambda kernel: -kernel["total_us"])


def _append_kernels(path: Path, label: str, kernels: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        for kernel in kernels:
            file.write(json.dumps({"step": label, **kernel}) + "\n")


def generation_cases(session: Session) -> list[Case]:
    """Tokens/s of greedy decoding, one prompt and many."""
    names = ["tiny"] if session.dry else ["124M", "1.3B"]
    return [
        Case(f"{name} {rows} prompts", partial(generate_tokens, session, name, rows), 45)
        for name in names
        for rows in (1, 4 if session.dry else 32)
    ]


def generate_tokens(session: Session, name: str, rows: int) -> Row:
    """New tokens per second, all prompts together, after a warm-up of the same length."""
    model, device = MODELS[name], session.device
    num_prompt, num_new = (8, 8) if session.dry else (128, 128)
    config = run_config(
        session.data,
        session.work_dir / "generation",
        device.kind,
        model=model,
        batch=(1, 1, model.max_seq_len),
        engine={"type": "local", "param_dtype": "bf16", "compile": False},
    )
    assert model.vocab_size is not None
    prompts = torch.randint(0, model.vocab_size, (rows, num_prompt)).tolist()
    with Training(config, session.collectives(config), quick_weights=True) as training:
        module: Any = training.engine.module
        seconds = device.seconds_per_step(
            lambda: generate(module, prompts, max_new_tokens=num_new, temperature=0), turns=2, steps=1
        )
    return {"model": name, "rows": rows, "new_tokens_per_s": round(rows * num_new / seconds, 1)}
