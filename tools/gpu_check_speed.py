"""Phases `machine`, `speed` and `speed-more` of `gpu_check.py`: rates, tokens/s, MFU and memory."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmark_rows import make_batches
from benchmark_steps import SHAPES, Setup, bare_step, transformers_step
from gpu_check_device import Device, Step
from gpu_check_memory import MemoryPlan, largest_micro_batch
from gpu_check_product import Session, Training, run_config
from gpu_check_worker import Case, CheckError, Row, SkipCase

from distft.engine.interface import DTYPES
from distft.model.counts import num_parameters, training_flops
from distft.model.experts_config import ExpertsConfig
from distft.model.transformer_config import TransformerConfig
from distft.run.config import RunConfig
from distft.train.throughput import measured_flops_per_s, peak_flops_per_s

MODELS: dict[str, TransformerConfig] = {
    # GPT-2's size and vocabulary, padded to a multiple of 64.
    "124M": TransformerConfig(
        vocab_size=50304, max_seq_len=1024, d_model=768, num_layers=12, num_heads=12, d_ff=2048
    ),
    # As many active parameters as 124M: each token passes through two experts of half the width.
    "124M of 8 experts": TransformerConfig(
        vocab_size=50304,
        max_seq_len=1024,
        d_model=768,
        num_layers=12,
        num_heads=12,
        d_ff=2048,
        experts=ExpertsConfig(num_experts=8, experts_per_token=2, d_ff=1024),
    ),
    "350M": TransformerConfig(
        vocab_size=51200, max_seq_len=2048, d_model=1024, num_layers=24, num_heads=16, d_ff=2816
    ),
    "1.3B": SHAPES["1.3B"],
    "7B": TransformerConfig(
        vocab_size=51200,
        max_seq_len=2048,
        d_model=4096,
        num_layers=32,
        num_heads=32,
        d_ff=11008,
        tie_embeddings=False,
    ),
    "tiny": TransformerConfig(vocab_size=512, max_seq_len=32, d_model=64, num_layers=2, num_heads=2, d_ff=96),
}
MAX_ROWS = {"124M": 32, "124M of 8 experts": 16, "350M": 16, "1.3B": 8, "7B": 8, "tiny": 2}
_USABLE_MEMORY = 0.88  # of the device's memory: the rest is for the allocator's gaps and the context
_WARM_UP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class SpeedCase:
    """One implementation and its settings."""

    model: str
    by: str = "distft local"  # or: distft zero 1, transformers, bare torch
    precision: str = "bf16"
    compile: bool = True
    packed: bool = False
    fp8: str = "none"
    checkpointing: str = "none"
    offload: bool = False

    @property
    def name(self) -> str:
        extras = [
            self.precision,
            "compiled" if self.compile else "eager",
            *(["packed"] if self.packed else []),
            *([f"fp8 {self.fp8}"] if self.fp8 != "none" else []),
            *([f"checkpointing {self.checkpointing}"] if self.checkpointing != "none" else []),
            *(["offload"] if self.offload else []),
        ]
        return f"{self.model} {self.by} {' '.join(extras)}"

    @property
    def labels(self) -> dict[str, Any]:
        return {"model": self.model, "by": self.by, "compiled": self.compile, "fp8": self.fp8}

    @property
    def zero_stage(self) -> int | None:
        return int(self.by[-1]) if self.by.startswith("distft zero") else None

    def memory(self, rows: int) -> MemoryPlan:
        model = MODELS[self.model]
        return MemoryPlan(
            model=model,
            precision=self.precision,
            micro_batch_size=rows,
            seq_len=model.max_seq_len,
            zero_stage=self.zero_stage,
            checkpointing=self.checkpointing,
            is_compiled=self.compile,
            offloads_optimizer=self.offload,
        )

    @property
    def engine(self) -> dict[str, Any]:
        settings: dict[str, Any] = {
            "type": "local",
            "param_dtype": self.precision,
            "compile": self.compile,
            "fp8": self.fp8,
            "activation_checkpointing": self.checkpointing,
        }
        if self.zero_stage is not None:
            settings |= {"type": "zero", "zero_stage": self.zero_stage}
            settings |= {"offload_optimizer": "cpu"} if self.offload else {}
        return settings


def machine_cases(session: Session) -> list[Case]:
    """The ceilings that the other phases are measured against, and the data that they train on."""
    return [
        Case("data", lambda: {"shards": bool(session.data.shards)}, 60),
        Case("product rates", partial(_product_rates, session), 40),
        Case("copy rate", partial(_copy_rate, session), 20),
    ]


def _product_rates(session: Session) -> Row:
    rates = measured_product_rates(session)
    return {f"{name}_tflop_per_s": round(rate / 1e12, 3) for name, rate in rates.items()}


def measured_product_rates(session: Session) -> dict[str, float]:
    """FLOP/s of a matrix product by precision; measured once, and kept in a file for later processes."""
    path = session.work_dir / "product_rates.json"
    if not path.exists():
        device = session.device.torch_device
        measured = {name: measured_flops_per_s(device, dtype) for name, dtype in DTYPES.items()}
        path.write_text(json.dumps(measured))
    rates: dict[str, float] = json.loads(path.read_text())
    return rates


def _copy_rate(session: Session) -> Row:
    num_bytes = 1 << (24 if session.dry else 32)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=session.device.torch_device).random_()
    target = torch.empty_like(source)
    seconds = session.device.seconds_per_step(lambda: target.copy_(source), turns=3, steps=3)
    return {"tb_per_s_read_and_written": round(2 * num_bytes / seconds / 1e12, 3)}


def speed_cases(session: Session) -> list[Case]:
    """What the goals are about, first of all 1.3B parameters. A dry run has one case of each kind."""
    return _cases(session, _dry_cases() if session.dry else _first_cases(), limit_s=75)


def more_speed_cases(session: Session) -> list[Case]:
    """The rest. A dry run only checks the settings of all cases, also of those in `speed`."""
    if session.dry:
        return [Case("settings", partial(check_settings, session))]
    return _cases(session, _more_cases(), limit_s=120)


def check_settings(session: Session) -> Row:
    """The number of cases that a GPU will run, all of whose settings are valid and of plausible size."""
    specs = [*_first_cases(), *_more_cases()]
    predicted = {}
    for spec in specs:
        rows = MAX_ROWS[spec.model]
        _config(session, spec, rows)
        predicted[spec.name] = _gb(spec.memory(rows).predicted_bytes())
    return {"cases": len(specs), "predicted_memory_gb_by_case": predicted}


def _cases(session: Session, specs: Iterator[SpeedCase], limit_s: float) -> list[Case]:
    return [
        Case(spec.name, partial(measure, session, spec), limit_s, {"model": spec.model}) for spec in specs
    ]


def _first_cases() -> Iterator[SpeedCase]:
    yield SpeedCase(model="1.3B")
    yield SpeedCase(model="1.3B", by="distft zero 1")
    yield SpeedCase(model="1.3B", fp8="tensorwise")
    yield SpeedCase(model="1.3B", by="transformers")
    yield SpeedCase(model="124M")
    yield SpeedCase(model="124M", by="transformers")
    yield SpeedCase(model="1.3B", packed=True)
    yield SpeedCase(model="1.3B", compile=False)
    yield SpeedCase(model="124M", packed=True)
    yield SpeedCase(model="1.3B", by="bare torch")
    yield SpeedCase(model="1.3B", fp8="rowwise")
    yield SpeedCase(model="1.3B", checkpointing="selective")
    yield SpeedCase(model="124M", by="distft zero 1")


def _more_cases() -> Iterator[SpeedCase]:
    yield SpeedCase(model="124M of 8 experts")
    yield SpeedCase(model="350M")
    yield SpeedCase(model="350M", by="transformers")
    yield SpeedCase(model="7B", checkpointing="full")
    yield SpeedCase(model="7B", by="distft zero 1", checkpointing="full", offload=True, compile=False)
    for stage in (2, 3):
        yield SpeedCase(model="1.3B", by=f"distft zero {stage}")
    yield SpeedCase(model="1.3B", checkpointing="full")
    yield SpeedCase(model="124M", compile=False)
    yield SpeedCase(model="124M", by="bare torch")
    yield SpeedCase(model="124M", by="transformers", compile=False)
    yield SpeedCase(model="350M", by="distft zero 1")
    yield SpeedCase(model="350M", compile=False)


def _dry_cases() -> Iterator[SpeedCase]:
    for by in ("distft local", "distft zero 1", "transformers", "bare torch"):
        yield SpeedCase(model="tiny", by=by, compile=False)
    yield SpeedCase(model="tiny", compile=False, packed=True)
    yield SpeedCase(model="tiny", compile=False, checkpointing="selective")
    yield SpeedCase(model="tiny", by="distft zero 1", compile=False, checkpointing="full", offload=True)


def measure(session: Session, spec: SpeedCase) -> Row:
    """Tokens/s of the largest micro-batch that is predicted to fit; half of it if it does not."""
    rows = _choose_rows(session.device, spec)
    for attempt in (rows, rows // 2):
        try:
            return _measure_rows(session, spec, attempt)
        except torch.OutOfMemoryError:
            session.device.free_memory()
    raise CheckError(
        f"out of memory, also with {rows // 2} rows", predicted_gb=_gb(spec.memory(rows).predicted_bytes())
    )


def _choose_rows(device: Device, spec: SpeedCase) -> int:
    limit = _USABLE_MEMORY * device.memory_bytes()
    plan = spec.memory(MAX_ROWS[spec.model])
    rows = largest_micro_batch(plan, limit)
    needed = spec.memory(rows).predicted_bytes()
    if needed > limit:
        raise SkipCase(f"needs {_gb(needed)} GB, and the device has {_gb(device.memory_bytes())}")
    host_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if plan.host_bytes() > 0.9 * host_bytes:
        raise SkipCase(f"needs {_gb(plan.host_bytes())} GB on the host, which has {_gb(host_bytes)}")
    return rows


def _measure_rows(session: Session, spec: SpeedCase, rows: int) -> Row:
    model, device = MODELS[spec.model], session.device
    product_rates = measured_product_rates(session)
    device.reset_peak_memory()
    if spec.by.startswith("distft"):
        config = _config(session, spec, rows)
        with Training(config, session.collectives(config), quick_weights=True) as training:
            timing = _time(device, training.step)
            pairs = training.num_attention_pairs
    else:
        timing = _time(device, _baseline(spec, rows, device))
        pairs = rows * model.max_seq_len**2
    num_tokens = rows * model.max_seq_len
    flops = training_flops(model, model.max_seq_len).of(num_tokens, pairs) / timing["step_s"]
    predicted, peak = spec.memory(rows).predicted_bytes(), device.peak_memory_bytes()
    is_distft = spec.by.startswith("distft")
    return {
        "tokens_per_s": round(num_tokens / timing["step_s"]),
        "mfu": round(flops / peak_flops_per_s(device.torch_device, DTYPES["bf16"]), 4),
        "share_of_product_rate": round(flops / product_rates[spec.precision], 4),
        **{name: round(value, 4) for name, value in timing.items()},
        "micro_batch_size": rows,
        "seq_len": model.max_seq_len,
        "parameters": num_parameters(model),
        "peak_memory_gb": _gb(peak),
        **({"predicted_memory_gb": _gb(predicted)} if is_distft else {}),
    }


def _config(session: Session, spec: SpeedCase, rows: int) -> RunConfig:
    model = MODELS[spec.model]
    return run_config(
        session.data,
        session.work_dir / "speed",
        session.device.kind,
        model=model,
        batch=(rows, rows, model.max_seq_len),
        engine=spec.engine,
        packed=spec.packed,
    )


def _time(device: Device, step: Step) -> dict[str, float]:
    started = time.perf_counter()
    for _ in range(_WARM_UP_STEPS):
        step()
    device.synchronize()
    warm_up_s = time.perf_counter() - started
    return {"step_s": device.seconds_per_step(step, turns=3, steps=2), "warm_up_s": warm_up_s}


def _baseline(spec: SpeedCase, rows: int, device: Device) -> Step:
    model = MODELS[spec.model]
    setup = Setup(
        model=model,
        precision=spec.precision,
        micro_batch_size=rows,
        seq_len=model.max_seq_len,
        compile=spec.compile,
        device=device.torch_device,
        batches=make_batches(model, rows, model.max_seq_len, device.torch_device),
    )
    makers: dict[str, Callable[..., Step | None]] = {
        "transformers": transformers_step,
        "bare torch": bare_step,
    }
    step = makers[spec.by](setup, compiled=spec.compile)
    if step is None:
        raise SkipCase("transformers is not installed")
    return step


def _gb(num_bytes: float) -> float:
    return round(num_bytes / 1e9, 2)
