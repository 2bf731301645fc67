"""Runs on real clusters whose nodes come and go have the losses of an undisturbed run."""

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


def inject(folder: Path, *kinds: str, max_workers: int) -> tuple[dict[str, Any], list[str]]:
    """Run tools/chaos.py with these kinds of fault: its result, and the kinds of the run's events."""
    command = [sys.executable, str(ROOT / "tools/chaos.py"), "--directory", str(folder), "--in-order"]
    options = [f"--max-workers={max_workers}", "--steps-between=12", "--kinds", *kinds]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=840, check=False)
    log = folder / "run.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    events = (folder / "run/events.jsonl").read_text().splitlines()
    return json.loads(done.stdout.splitlines()[-1]), [json.loads(line)["kind"] for line in events]


def test_shrinking_and_growing_a_run_changes_no_loss(tmp_path: Path) -> None:
    result, events = inject(tmp_path, "node lost", "two nodes join", max_workers=3)
    assert [size for size, _ in groupby(result["world_sizes"])] == [2, 1, 3]
    assert result["missing"] == result["repeated"] == []
    assert result["largest_difference"] < 1e-4
    assert events.count("resize") == 2
    assert events.count("fault") == 1


def test_a_drained_node_a_signal_and_failing_storage_change_no_loss(tmp_path: Path) -> None:
    """Only failing storage costs steps. tools/chaos.py checks the driver's exit code after the signal."""
    result, events = inject(tmp_path, "node drained", "driver terminated", "storage gone", max_workers=2)
    assert result["missing"] == result["repeated"] == []
    assert result["largest_difference"] < 1e-4
    assert (events.count("restart"), events.count("fault")) == (1, 1)
    assert 0 < result["num_lost_steps"] <= 20
