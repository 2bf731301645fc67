"""The watchdog of a single rank, and which processes a rank may kill."""

import os
import threading
from pathlib import Path

import pytest

from distft.collectives import SingleProcess
from distft.watch.rank_process import RankProcess
from distft.watch.watchdog import Watchdog


def test_a_single_rank_starts_no_watchdog_thread(tmp_path: Path) -> None:
    num_threads = threading.active_count()
    with Watchdog(
        SingleProcess(), tmp_path, heartbeat_s=0.01, hang_timeout_s=1, interval_steps=1
    ) as watchdog:
        assert threading.active_count() == num_threads
        assert watchdog.take_stragglers() == []


def test_a_rank_kills_only_processes_of_its_launcher_on_its_machine() -> None:
    own = RankProcess.current()
    launcher = RankProcess(
        host=own.host, pid=own.parent_pid, parent_pid=own.parent_pid, pid_namespace=own.pid_namespace
    )
    elsewhere = RankProcess(
        host="elsewhere", pid=1, parent_pid=own.parent_pid, pid_namespace="another kernel"
    )
    unknown = RankProcess(host=own.host, pid=own.parent_pid, parent_pid=own.parent_pid, pid_namespace="")
    assert not any(own.kill_sibling(other) for other in (own, launcher, elsewhere, unknown))
    os.kill(own.parent_pid, 0)  # the launcher lives


@pytest.mark.parametrize("pid_namespace", ["", "another"])
def test_a_rank_in_an_unknown_or_wrong_pid_namespace_kills_nothing(pid_namespace: str) -> None:
    own = RankProcess(host="a", pid=os.getpid(), parent_pid=os.getppid(), pid_namespace=pid_namespace)
    other = RankProcess(host="a", pid=1, parent_pid=os.getppid(), pid_namespace=pid_namespace)
    assert not own.kill_sibling(other)
