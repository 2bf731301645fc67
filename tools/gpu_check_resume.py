"""Phase `resume` of `gpu_check.py`: a saved, moved and resumed run has the losses of one that is not."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check_parity import TOLERANCES, require_equal, small_batch, small_model
from gpu_check_product import Session, run_config
from gpu_check_speed import MODELS
from gpu_check_worker import Case, CheckError, Row

from distft.errors import Preempted
from distft.run.train import run_training
from distft.topology import Topology
from distft.train.services import StopReason


@dataclass(frozen=True, slots=True)
class Leg:
    """A part of a run: trained on `device` by `engine` up to about `stop_step`, then saved."""

    run: str
    device: str
    engine: dict[str, Any]
    stop_step: int | None = None  # None: to the end
    tolerance: str = "fp32"

    @property
    def name(self) -> str:
        engine = self.engine["type"] + (
            f" {self.engine['zero_stage']}" if "zero_stage" in self.engine else ""
        )
        until = "to the end" if self.stop_step is None else f"to step {self.stop_step}"
        return f"{self.run}: {engine} {self.engine['param_dtype']} on {self.device} {until}"


def resume_cases(session: Session) -> list[Case]:
    """The first run never stops; the others are compared with it.

    A run closes its process group, and DeepSpeed cannot use a second one: its legs end their processes.
    """
    gpu, last = session.device.kind, 4 if session.dry else 20
    middle, late = last * 2 // 5, last * 7 // 10
    fp32, bf16 = {"param_dtype": "fp32", "compile": False}, {"param_dtype": "bf16", "compile": False}
    legs = [
        Leg("straight", gpu, {"type": "local", **fp32}),
        Leg("moved", gpu, {"type": "zero", "zero_stage": 2, **fp32}, middle),
        Leg("moved", "cpu", {"type": "local", **fp32}, late),
        Leg("moved", gpu, {"type": "zero", "zero_stage": 3, **fp32}),
        Leg("interrupted", gpu, {"type": "zero", "zero_stage": 1, **bf16}, middle, tolerance="bf16"),
        Leg("interrupted", gpu, {"type": "zero", "zero_stage": 1, **bf16}, tolerance="bf16"),
    ]
    cases = [
        Case(
            leg.name,
            partial(run_leg, session, leg, last),
            45,
            {"precision": leg.tolerance},
            ends_process=leg.engine["type"] == "zero",
        )
        for leg in legs
    ]
    straight, *others = cases[:4] if session.dry else cases
    return [straight, Case("background save", partial(background_save, session), 60), *others]


def run_leg(session: Session, leg: Leg, last: int) -> Row:
    """Train the leg by the product's own `run_training`; its losses equal those of the straight run."""
    run_dir = session.work_dir / "runs" / leg.run
    config = run_config(
        session.data,
        run_dir,
        leg.device,
        model=small_model(session),
        batch=small_batch(session),
        engine=leg.engine,
        packed=True,
        max_steps=last,
    )
    before = _logged(run_dir) if run_dir.exists() else {}
    calls = 0

    def stop_requested() -> StopReason | None:
        nonlocal calls
        calls += 1
        is_due = leg.stop_step is not None and len(before) + calls >= leg.stop_step
        return "requested" if is_due else None

    try:
        run_training(config, Topology(), stop_requested)
    except Preempted as stop:
        if leg.stop_step is None:
            raise CheckError(f"it stopped although nobody asked: {stop}") from None
    losses = _logged(run_dir)
    new_steps = sorted(losses.keys() - before.keys())
    if not new_steps or new_steps != list(range(len(before) + 1, new_steps[-1] + 1)):
        raise CheckError(f"after step {len(before)} it trained steps {new_steps}")
    if leg.stop_step is None and new_steps[-1] != last:
        raise CheckError(f"it ended at step {new_steps[-1]}, not {last}")
    expected = _logged(session.work_dir / "runs" / "straight")
    values = require_equal(
        [losses[step] for step in new_steps],
        [expected[step] for step in new_steps],
        TOLERANCES[leg.tolerance],
    )
    return {"from_step": len(before), "to_step": new_steps[-1], **values}


def _logged(run_dir: Path) -> dict[int, float]:
    """The loss by step, from the run's metrics."""
    rows = _json_lines(run_dir / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _json_lines(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def background_save(session: Session) -> Row:
    """How long training waits for a save in the background: the first one allocates host memory."""
    run_dir = session.work_dir / "runs" / "background save"
    model = MODELS["tiny" if session.dry else "124M"]
    rows = 2 if session.dry else 32
    config = run_config(
        session.data,
        run_dir,
        session.device.kind,
        model=model,
        batch=(rows, rows, model.max_seq_len),
        engine={"type": "local", "param_dtype": "bf16", "compile": False},
        # On an H100, 40 steps of 0.08 s are longer than the write of 1.5 GB, for which the next save waits.
        max_steps=9 if session.dry else 120,
        checkpoint={"every_steps": 3 if session.dry else 40, "keep_last": 1},
    )
    run_training(config, Topology())
    saves = [event for event in _json_lines(run_dir / "events.jsonl") if event.get("kind") == "save"]
    if len(saves) != 3:
        raise CheckError(f"{len(saves)} of 3 saves were committed")
    files = sum(path.stat().st_size for path in run_dir.rglob("*.safetensors"))
    return {
        "model": "tiny" if session.dry else "124M",
        "checkpoint_gb": round(files / 1e9, 3),
        "stall_s": [save["stall_s"] for save in saves],
        "write_s": [save["write_s"] for save in saves],
    }
