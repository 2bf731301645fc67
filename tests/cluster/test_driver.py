"""Runs on real Ray: a local one that the driver starts, and a cluster of two nodes."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.commands import call, call_python
from support.small_runs import logged, pretraining, run

from distft.cluster.driver.driver import check_run
from distft.errors import ConfigError
from distft.run.config import load_run_config
from distft.topology import Topology

HERE = Path(__file__).parent
NUM_STEPS = 12

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def expected(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one process without DeepSpeed or Ray."""
    run_dir = tmp_path_factory.mktemp("local")
    run(Topology(), pretraining(project / "data", run_dir))
    return logged(run_dir)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.wokers=2", "data.sources=[{path: elsewhere}]"], "workers"),
        (["data.sources=[{path: elsewhere}]"], "elsewhere"),
    ],
)
def test_mistakes_are_reported_before_a_cluster_is_contacted(
    project: Path, environment: Mapping[str, str], overrides: list[str], message: str
) -> None:
    nowhere = {**environment, "RAY_ADDRESS": "192.0.2.1:6379"}  # an attempt to connect would take minutes
    done = call_python("launch/ray_train.py", "c.yaml", *overrides, env=nowhere, cwd=project, timeout_s=280)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine={type: local}", "2 ranks"),
        ("cluster.workers=9", "at most 8 ranks"),
        ("device=cuda", "gpus_per_worker=0"),
        ("cluster.gpus_per_worker=1", "device=cpu"),
    ],
)
def test_a_run_that_no_cluster_can_train_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    monkeypatch.chdir(project)
    config = load_run_config("c.yaml", [override])
    with pytest.raises(ConfigError, match=message):
        check_run(config)


def test_a_local_ray_gives_the_losses_of_one_process(
    project: Path, environment: Mapping[str, str], expected: dict[int, float]
) -> None:
    done = call_python("launch/ray_train.py", "c.yaml", env=environment, cwd=project)
    assert done.returncode == 0, done.stderr
    assert logged(project / "runs/small") == pytest.approx(expected, abs=1e-5)
    assert "start | step 0 | world size 2 | engine zero" in done.stdout
    assert f"step {NUM_STEPS}/{NUM_STEPS} | loss {expected[NUM_STEPS]:.4f}" in done.stdout
    assert "pid=" not in done.stdout + done.stderr  # Ray's prefix of forwarded lines
    assert not list((project / "runs/small").glob(".*"))


def test_a_submitted_directory_trains_on_two_nodes_and_its_run_dir_outlives_the_job(
    project: Path, cluster: Mapping[str, str], expected: dict[int, float]
) -> None:
    done = _ray_job_submit(project, cluster, "python launch/ray_train.py c.yaml run_dir=runs/job")
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = Path(cluster["HOME"]) / "distft/runs/job"
    assert f"run_dir is {run_dir} on the nodes" in done.stdout
    assert f"step {NUM_STEPS}/{NUM_STEPS} | loss {expected[NUM_STEPS]:.4f}" in done.stdout
    assert logged(run_dir) == pytest.approx(expected, abs=1e-5)


def _ray_job_submit(
    project: Path, cluster: Mapping[str, str], entrypoint: str
) -> "subprocess.CompletedProcess[str]":
    """`ray job submit`, repeated until a job agent is up."""
    environment = {**cluster, "RAY_ADDRESS": cluster["dashboard"]}
    command = ["ray", "job", "submit", "--working-dir", ".", "--", *entrypoint.split(" ")]
    deadline = time.monotonic() + 60
    while True:
        done = call(*command, env=environment, cwd=project)
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)


def test_a_start_timeout_names_the_requested_and_the_available_resources(
    project: Path, cluster: Mapping[str, str]
) -> None:
    overrides = ["cluster.workers=3", "cluster.start_timeout_s=4", "run_dir=runs/too_large"]
    done = call_python("launch/ray_train.py", "c.yaml", *overrides, env=cluster, cwd=project, timeout_s=120)
    assert done.returncode == 1, done.stderr
    assert (
        "the run requests 3 workers with 1 CPUs and 0 GPUs each; the cluster has 2 nodes with 2 CPUs"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_a_temporary_directory_that_is_too_long_for_rays_sockets_is_named(
    project: Path, environment: Mapping[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / ("long_" * 20)
    folder.mkdir()
    done = call_python(
        "launch/ray_train.py", "c.yaml", env={**environment, "TMPDIR": str(folder)}, cwd=project
    )
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert re.search(rf"config error: TMPDIR={folder} is too long for Ray's sockets.* 107 bytes", done.stderr)


def test_a_ray_that_cannot_start_is_one_error(project: Path, environment: Mapping[str, str]) -> None:
    nowhere = {**environment, "RAY_TMPDIR": "/proc/none"}
    done = call_python("launch/ray_train.py", "c.yaml", env=nowhere, cwd=project)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert "launch error: Could not start Ray here: [Errno 2]" in done.stderr
    assert "'/proc/none'" in done.stderr


@pytest.mark.parametrize("num_interrupts", [1, 2])
def test_ctrl_c_saves_and_a_second_one_ends_at_once_without_a_traceback(
    project: Path, environment: Mapping[str, str], tmp_path: Path, num_interrupts: int
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = ["c.yaml", f"run_dir={run_dir}", "train.max_steps=4000", "checkpoint.every_steps=5"]
    command = [sys.executable, "launch/ray_train.py", *arguments]
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            env=environment,
            cwd=project,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as driver,
    ):
        while '"kind": "save"' not in _text(run_dir / "events.jsonl"):
            assert driver.poll() is None, log.read_text()
            time.sleep(0.1)
        driver.send_signal(signal.SIGINT)
        while "A second Ctrl-C stops at once" not in log.read_text():
            time.sleep(0.05)
        if num_interrupts == 2:
            driver.send_signal(signal.SIGINT)
        driver.wait(timeout=120)
    text = log.read_text()
    assert "Traceback" not in text
    if num_interrupts == 1:
        assert driver.returncode == 75, text
        assert re.search(r"Stopped at step \d+ as asked; start again to resume", text)
    else:
        assert driver.returncode == 130 or "Stopped at step" in text, text
        assert re.search(r"Step \d+ is saved: the same command goes on|Stopped at step", text), text


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@dataclass(frozen=True, kw_only=True)
class FailingRuns:
    """Results of scenarios.py."""

    folder: Path  # with the run_dir of each run
    killed_once: dict[str, Any]
    bug_then_mistake: dict[str, Any]
    stderr: str  # of both


@pytest.fixture(scope="module")
def failing(
    project: Path, cluster: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> FailingRuns:
    folder, names = tmp_path_factory.mktemp("failing"), ["killed_once", "bug_then_mistake"]
    done = call_python(
        HERE / "scenarios.py", "c.yaml", folder, *names, env=cluster, cwd=project, timeout_s=400
    )
    assert done.returncode == 0, done.stderr
    killed, mistaken = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return FailingRuns(folder=folder, killed_once=killed, bug_then_mistake=mistaken, stderr=done.stderr)


def test_a_killed_worker_is_replaced_and_the_losses_stay_the_same(
    failing: FailingRuns, expected: dict[int, float]
) -> None:
    assert (failing.killed_once["exit_code"], failing.killed_once["step"]) == (0, NUM_STEPS)
    assert logged(failing.folder / "killed_once") == pytest.approx(expected, abs=1e-5)
    assert (failing.folder / "killed_once/starts").read_text() == "xx"


def test_a_restart_starts_no_process_but_those_of_the_ranks(failing: FailingRuns) -> None:
    """Others would take cores from the ranks while these import torch."""
    classes = json.loads((failing.folder / "killed_once/second_start.json").read_text())["actors"]
    assert classes.count("RayTrainWorker") == 4  # two ranks, twice
    assert [name for name in set(classes) if classes.count(name) > 1] == ["RayTrainWorker"]


def test_workers_collect_garbage_in_training_but_not_while_they_import(failing: FailingRuns) -> None:
    process = json.loads((failing.folder / "killed_once/second_start.json").read_text())
    assert process["collects_garbage"]
    assert process["full_collections"] <= 1  # 5 otherwise: Ray and torch make a million objects


def test_an_unexpected_error_is_printed_once_with_its_traceback(failing: FailingRuns) -> None:
    assert failing.stderr.count("rank 1: ZeroDivisionError: a bug\nof two lines") == 1
    assert "in bug_then_mistake" in failing.stderr  # the frame that raised


def test_a_users_mistake_ends_the_run_without_another_restart(failing: FailingRuns) -> None:
    assert failing.bug_then_mistake["exit_code"] == 2
    assert failing.bug_then_mistake["message"] == "rows.jsonl:3: this label was never seen"
    assert (failing.folder / "bug_then_mistake/starts").read_text() == "xx"


def test_each_restart_is_announced_once(failing: FailingRuns) -> None:
    assert failing.stderr.count("Starting the workers again (1 of 3)") == 2  # one restart in each run
