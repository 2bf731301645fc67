"""How torch's threads on a CPU wait, and how many there are."""

import os
import subprocess
import sys

import pytest

from distft.run.environment import prepare_for_torch, usable_cores


def test_threads_sleep_while_they_wait_and_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("distft.run.environment.usable_cores", lambda: 8)
    for local_ranks, threads in ((None, "8"), ("3", "2"), ("16", "1")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if local_ranks is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
        prepare_for_torch()
        assert (os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"]) == ("PASSIVE", threads)


def test_what_the_environment_says_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    prepare_for_torch()
    assert (os.environ["OMP_WAIT_POLICY"], os.environ["OMP_NUM_THREADS"]) == ("ACTIVE", "5")


def test_a_process_that_may_use_one_core_has_one() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    code += "from distft.run.environment import usable_cores; print(usable_cores())"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "1\n"
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))
