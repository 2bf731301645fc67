"""launch/slurm.sh with stubs of srun and scontrol: the commands it runs, and a training on two nodes."""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import network_nodes
import pytest
import yaml
from support.small_runs import logged, make_text_data, pretraining

from distft.cluster.tokens import ensure_token

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path(__file__).parent / "slurm"
NUM_STEPS = 12


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@contextlib.contextmanager
def _start(
    project: Path, stub: dict[str, Any], nodes: list[str], **environ: str
) -> "Iterator[subprocess.Popen[str]]":
    """The script as Slurm starts it on the first node; at the end of the block all its processes are killed.

    `stub` configures the stub of srun: see tests/launch/slurm/srun.
    """
    (project / "stub.json").write_text(json.dumps({"log": str(project / "log"), **stub}))
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "DISTFT_", "SLURM_", "HEAD_"))
    }
    path = [str(STUBS), str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {
        **kept,
        "PATH": os.pathsep.join(path),
        "PYTHONPATH": str(ROOT),
        "HOME": str(project),
        "SLURM_STUB": str(project / "stub.json"),
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NODELIST": ",".join(nodes),
        "SLURM_SUBMIT_DIR": str(project),
        "SLURM_CPUS_ON_NODE": "1",
        **environ,
    }
    command = [str(ROOT / "launch/slurm.sh"), "c.yaml", "train.max_steps=12"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(
        command, env=environment, text=True, cwd="/", start_new_session=True, **pipes
    ) as script:
        try:
            yield script
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)


def _calls(project: Path) -> list[dict[str, Any]]:
    """Calls of srun and scontrol, in order."""
    return [json.loads(line) for line in (project / "log").read_text().splitlines()]


def test_every_node_runs_the_same_command_and_the_exit_code_is_that_of_the_run(project: Path) -> None:
    answers = {"hostname -I": "echo 192.0.2.7 10.0.0.7", "ray symmetric-run": "exit 2"}
    with _start(project, {"answers": answers}, ["a1", "a2", "a3"]) as script:
        output, _ = script.communicate(timeout=60)
    assert (script.returncode, output) == (2, "")
    hostname, run = _calls(project)
    assert hostname["options"] == ["--nodes=1", "--ntasks=1", "--nodelist=a1"]
    assert run["options"] == [
        "--nodes=3", "--ntasks-per-node=1", "--no-kill", "--kill-on-bad-exit=0", "--wait=0"
    ]  # fmt: skip
    ray, driver = " ".join(run["command"]).split(" -- ")
    address = "--address 192.0.2.7:21234 --min-nodes 3"
    assert ray == f"ray symmetric-run {address} --num-cpus=1 --object-store-memory=200000000"
    assert driver.endswith("RAY_ADDRESS=192.0.2.7:21234 python launch/ray_train.py c.yaml train.max_steps=12")
    assert not list(project.glob(".distft_job_*"))


def test_nodes_get_the_token_through_a_file_that_only_its_owner_can_read(project: Path) -> None:
    copy_token = (
        f'cp -p "$RAY_AUTH_TOKEN_PATH" {project}/copy; echo "$RAY_AUTH_MODE"; '
        'stat -c %a "$(dirname "$RAY_AUTH_TOKEN_PATH")"'
    )
    answers = {"hostname -I": "echo 192.0.2.7", "ray symmetric-run": copy_token}
    with _start(project, {"answers": answers}, ["a1"]) as script:
        output, _ = script.communicate(timeout=60)
    assert output.split() == ["token", "700"]
    token = (project / "copy").read_text()
    assert len(token) == 64
    assert stat.S_IMODE((project / "copy").stat().st_mode) == 0o600
    assert token not in output + (project / "log").read_text()


@pytest.mark.parametrize(("exit_code", "is_requeued"), [(75, True), (1, True), (0, False)])
def test_before_the_time_limit_the_driver_gets_sigterm_and_an_unfinished_job_is_requeued(
    project: Path, exit_code: int, is_requeued: bool
) -> None:
    wait = f"until [ -e {project}/stop ]; do sleep 0.05; done"
    answers = {
        "hostname -I": "echo 192.0.2.7",
        "ray symmetric-run": f"touch {project}/runs; {wait}; exit {exit_code}",
        "kill -TERM": f"touch {project}/stop",
    }
    with _start(project, {"answers": answers}, ["a1", "a2"]) as script:
        _wait_for(project / "runs")
        script.send_signal(signal.SIGTERM)
        output, _ = script.communicate(timeout=60)
    assert script.returncode == exit_code
    calls = _calls(project)
    assert calls[2]["options"] == ["--overlap", "--nodes=1", "--ntasks=1", "--nodelist=a1"]
    assert calls[2]["command"][-1].endswith("driver.pid")
    assert (calls[3:] == [{"scontrol": ["requeue", "1234"]}]) is is_requeued
    assert ("resumes from its last checkpoint" in output) is is_requeued


def _wait_for(path: Path, timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_nodes_train_as_one_cluster_and_no_log_or_file_of_the_run_shows_the_token(project: Path) -> None:
    if reason := network_nodes.why_unavailable():
        pytest.skip(reason)
    make_text_data(project / "data")
    cluster = {"workers": 2, "network_interface": network_nodes.INTERFACE}
    engine = {"type": "zero", "zero_stage": 1}
    raw = pretraining(Path("data"), Path("runs/small"), engine=engine, cluster=cluster)
    (project / "c.yaml").write_text(yaml.safe_dump(raw))
    environ = {"RAY_AUTH_TOKEN_PATH": str(project / "token")}
    ensure_token(environ)
    token = (project / "token").read_text()
    with network_nodes.Network(project) as network:
        nodes = {node.name: node.pid for node in (network.add_node(), network.add_node())}
        with _start(project, {"nodes": nodes}, list(nodes), **environ) as script:
            output, _ = script.communicate(timeout=300)
    assert script.returncode == 0, output
    assert "start | step 0 | world size 2 | engine zero" in output
    assert sorted(logged(project / "runs/small")) == list(range(1, NUM_STEPS + 1))
    assert not list(project.glob(".distft_job_*"))
    files = [path for path in project.rglob("*") if path.is_file()]  # the run's, and Ray's logs of both nodes
    assert any(path.name == "raylet.out" for path in files)
    with_token = [path for path in files if token.encode() in path.read_bytes()]
    assert with_token == [project / "token"]
    assert token not in output
