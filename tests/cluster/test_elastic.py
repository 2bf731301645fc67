"""A run whose nodes come and go, on a real cluster of several nodes, against one that nobody disturbed."""

import json
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from distft.cluster.room import room_for, there_is, wanted
from distft.run.cluster import ClusterConfig

ROOT = Path(__file__).resolve().parents[2]


def _storm(folder: Path, *kinds: str, max_workers: int) -> tuple[dict[str, Any], list[str]]:
    """What the audit found, and the kinds of the run's events."""
    command = [sys.executable, str(ROOT / "tools/chaos.py"), "--directory", str(folder), "--in-order"]
    options = [f"--max-workers={max_workers}", "--steps-between=12", "--kinds", *kinds]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=840, check=False)
    log = folder / "run.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
    events = (folder / "run/events.jsonl").read_text().splitlines()
    return json.loads(done.stdout.splitlines()[-1]), [json.loads(line)["kind"] for line in events]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_run_shrinks_and_grows_and_its_losses_are_those_of_an_undisturbed_one(tmp_path: Path) -> None:
    found, kinds = _storm(tmp_path, "node lost", "two nodes join", max_workers=3)
    assert [size for size, _ in groupby(found["world_sizes"])] == [2, 1, 3]
    assert found["missing"] == found["repeated"] == []
    assert found["largest_difference"] < 1e-4
    assert kinds.count("resize") == 2
    assert kinds.count("fault") == 1


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_notice_a_signal_and_storage_that_fails_change_no_loss(tmp_path: Path) -> None:
    """Only the last costs steps; the run's driver ends after the signal with its own exit code."""
    found, kinds = _storm(tmp_path, "node drained", "driver terminated", "storage gone", max_workers=2)
    assert found["missing"] == found["repeated"] == []
    assert found["largest_difference"] < 1e-4
    assert (kinds.count("restart"), kinds.count("fault")) == (1, 1)
    assert 0 < found["num_lost_steps"] <= 20


@pytest.mark.parametrize(
    ("asked", "nodes", "expected"),
    [
        ({"CPU": 1.0}, [{"CPU": 2.0}, {"CPU": 1.0}], 3),
        ({"CPU": 1.0, "GPU": 1.0}, [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}], 2),
        ({"CPU": 0.1}, [{"CPU": 0.3}], 3),
        ({"CPU": 1.0, "GPU": 0.0}, [{"CPU": 0.5}, {"CPU": 0.5}], 0),
        ({"CPU": 1.0, "memory": 2e9}, [{"CPU": 4.0, "memory": 5e9}], 2),
    ],
)
def test_room_is_counted_node_by_node(
    asked: dict[str, float], nodes: list[dict[str, float]], expected: int
) -> None:
    assert room_for(asked, nodes) == expected


def test_what_is_asked_for_and_what_there_is_are_told_in_words() -> None:
    cluster = ClusterConfig.model_validate(
        {
            "workers": {"min": 2, "max": 5},
            "gpus_per_worker": 1,
            "accelerator_type": "H100",
            "placement": "SPREAD",
        }
    )
    assert wanted(cluster) == "2 to 5 workers with 1 CPUs and 1 GPUs each (H100)"
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}]
    assert there_is(nodes, [{"CPU": 1.0}]) == "2 nodes with 8 CPUs (1 free) and 1 GPUs (0 free)"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"workers": {"min": 3, "max": 2}}, "min=3"),
        ({"workers": 0}, "workers=0"),
        ({"workers": {"max": 2}, "placement": "STRICT_SPREAD"}, "STRICT_SPREAD"),
        ({"accelerator_type": "H100"}, "gpus_per_worker=0"),
    ],
)
def test_what_cannot_be_placed_ever_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ClusterConfig.model_validate(settings)
