"""launch/smoke.sh with every launcher that needs no cluster; tests/cluster covers Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def _smoke(*launchers: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(LAUNCH / "smoke.sh"), *launchers],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.mark.ranks
@pytest.mark.slow
def test_every_launcher_trains_to_the_same_losses() -> None:
    done = _smoke("plain", "torchrun", "deepspeed")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["plain", "torchrun", "deepspeed"]
    assert len({row[2][:6] for row in rows}) == 1


def test_an_unknown_launcher_is_refused_before_anything_is_trained() -> None:
    done = _smoke("plain", "slurmy")
    assert (done.returncode, done.stdout) == (2, "")
    assert "slurmy" in done.stderr
