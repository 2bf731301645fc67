"""Phase `two-ranks` of `gpu_check.py`: two ranks over gloo on one device agree with a single process.

NCCL refuses two ranks on one GPU; gloo moves a GPU's tensors through host memory. Started as a script, this
is one of the two ranks.
"""

import argparse
import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_check_device import Device
from gpu_check_parity import TOLERANCES, reference_losses, require_equal, small_batch, small_model
from gpu_check_product import Session, Training, run_config
from gpu_check_worker import Case, CheckError, Row, SkipCase
from torch._C._distributed_c10d import FileStore

from distft.collectives import ProcessGroup
from distft.run.environment import configure_environment
from distft.topology import Topology

_TIMEOUT_S = 20.0  # of a collective
_STAGES = (1, 0, 2, 3)


def rank_cases(session: Session) -> list[Case]:
    return [Case("zero 0 to 3 fp32 packed", partial(compare_ranks, session), 60)]


def compare_ranks(session: Session) -> Row:
    """Train at each stage on two ranks, and compare the losses with those of one process on the CPU."""
    expected = reference_losses(session, packed=True, dropout=0.0)
    command = [sys.executable, __file__, "--work-dir", str(session.work_dir), "--steps", str(len(expected))]
    ranks = [
        subprocess.Popen(
            [*command, *(["--dry"] if session.dry else [])],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    codes = [process.wait() for process in ranks]
    differences, missing = {}, {}
    for stage in _STAGES:
        results = [_read(_result_file(session.work_dir, stage, rank)) for rank in range(2)]
        errors = [result["error"] for result in results if "error" in result]
        if errors:
            missing[stage] = errors[0]
            continue
        rows = [require_equal(result["losses"], expected, TOLERANCES["fp32"]) for result in results]
        differences[stage] = max(row["max_difference"] for row in rows)
    values = {"exit_codes": codes, "differences": differences, "missing": missing}
    if missing and session.dry:
        raise CheckError(f"two ranks failed at {missing}", **values)
    if not differences:
        raise SkipCase(f"two gloo ranks on one GPU cannot be had: {missing}")
    return {"max_difference": max(differences.values()), **values}


def _result_file(work_dir: Path, stage: int, rank: int) -> Path:
    return work_dir / f"ranks_stage_{stage}_rank_{rank}.json"


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"error": "the rank ended before this stage"}
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def main() -> None:
    """One rank: train at each stage, and write the losses or the error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    device = Device.choose(dry=arguments.dry)
    topology = configure_environment(device.kind)
    if arguments.dry:
        torch.set_num_threads(1)
    session = Session(device, arguments.work_dir, arguments.dry)
    dist.init_process_group(
        "gloo",
        store=FileStore(str(arguments.work_dir / "ranks_store"), 2),
        rank=topology.rank,
        world_size=2,
        timeout=timedelta(seconds=_TIMEOUT_S),
    )
    # It finds the group above, and so makes none over NCCL.
    collectives = ProcessGroup(topology, device.torch_device, _TIMEOUT_S)
    for stage in _STAGES:
        target = _result_file(arguments.work_dir, stage, topology.rank)
        target.write_text(json.dumps(_train(session, collectives, topology, stage, arguments.steps)))
    os._exit(0)  # if a peer has failed, the group's regular end would wait for it


def _train(
    session: Session, collectives: ProcessGroup, topology: Topology, stage: int, num_steps: int
) -> dict[str, Any]:
    config = run_config(
        session.data,
        session.work_dir / "ranks",
        session.device.kind,
        model=small_model(session),
        batch=small_batch(session),
        engine={"type": "zero", "zero_stage": stage, "compile": False},
        packed=True,
    )
    try:
        with Training(config, collectives, topology=topology) as training:
            return {"losses": training.losses(num_steps)}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:600]}


if __name__ == "__main__":
    main()
