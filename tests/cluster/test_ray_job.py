"""Runs on real Ray: one of this machine's own, and a cluster of two nodes that takes jobs."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import logged, make_text_data, pretraining, run

from distft.cluster.ray_job import check
from distft.errors import ConfigError
from distft.run.config import load_run_config
from distft.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
NUM_STEPS = 12

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as users submit it: launch/, data/, a configuration with relative paths."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    make_text_data(folder / "data")
    engine = {"type": "zero", "zero_stage": 1}
    raw = pretraining(Path("data"), Path("runs/small"), engine=engine, cluster={"workers": 2})
    (folder / "c.yaml").write_text(yaml.safe_dump(raw))
    return folder


@pytest.fixture(scope="module")
def expected(project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one process without DeepSpeed or Ray."""
    run_dir = tmp_path_factory.mktemp("local")
    run(Topology(), pretraining(project / "data", run_dir))
    return logged(run_dir)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of everything that is started here: a home of its own, this Python, and no cluster by accident."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DISTFT_"))}
    return {
        **kept,
        "HOME": str(tmp_path_factory.mktemp("home")),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.fixture(scope="module")
def cluster(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a client of a cluster of two nodes; `dashboard` in it takes jobs."""
    port = _free_port()
    command = [sys.executable, str(HERE / "two_nodes.py"), str(port)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as nodes:
        assert nodes.stdin is not None
        assert nodes.stdout is not None
        address = nodes.stdout.readline().strip()
        assert address, "the cluster did not start"
        try:
            yield {**environment, "RAY_ADDRESS": address, "dashboard": f"http://127.0.0.1:{port}"}
        finally:
            nodes.stdin.close()
            nodes.wait(timeout=60)


def _free_port() -> int:
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def _call(
    *command: str | Path, env: Mapping[str, str], cwd: Path, timeout_s: float = 240
) -> "subprocess.CompletedProcess[str]":
    texts = [str(word) for word in command]
    return subprocess.run(
        texts, env=dict(env), cwd=cwd, timeout=timeout_s, capture_output=True, text=True, check=False
    )


def _python(*arguments: str | Path, **rest: Any) -> "subprocess.CompletedProcess[str]":
    return _call(sys.executable, *arguments, **rest)


def test_mistakes_are_told_before_a_cluster_is_looked_for(
    project: Path, environment: Mapping[str, str]
) -> None:
    nowhere = {**environment, "RAY_ADDRESS": "192.0.2.1:6379"}  # to look for it would take minutes
    faults = ["cluster.wokers=2", "data.sources=[{path: elsewhere}]"]
    done = _python("launch/ray_train.py", "c.yaml", *faults, env=nowhere, cwd=project, timeout_s=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "workers" in done.stderr
    done = _python("launch/ray_train.py", "c.yaml", faults[1], env=nowhere, cwd=project, timeout_s=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "elsewhere" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "runs").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("engine={type: local}", "2 ranks"),
        ("cluster.workers=9", "at most 8 ranks"),
        ("device=cuda", "gpus_per_worker=0"),
        ("cluster.gpus_per_worker=1", "device=cpu"),
    ],
)
def test_a_run_that_no_cluster_could_do_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch, override: str, told: str
) -> None:
    monkeypatch.chdir(project)
    config = load_run_config("c.yaml", [override])
    with pytest.raises(ConfigError, match=told):
        check(config)


def test_a_ray_of_its_own_gives_the_losses_of_one_process(
    project: Path, environment: Mapping[str, str], expected: dict[int, float]
) -> None:
    done = _python("launch/ray_train.py", "c.yaml", env=environment, cwd=project)
    assert done.returncode == 0, done.stderr
    assert logged(project / "runs/small") == pytest.approx(expected, abs=1e-5)
    assert done.stdout.startswith("start | step 0 | world size 2 | engine zero")
    assert f"step {NUM_STEPS}/{NUM_STEPS} | loss {expected[NUM_STEPS]:.4f}" in done.stdout
    assert "pid=" not in done.stdout + done.stderr  # Ray's mark on forwarded lines
    assert not list((project / "runs/small").glob(".*"))


def test_a_submitted_directory_trains_on_two_nodes_and_outlives_the_job(
    project: Path, cluster: Mapping[str, str], expected: dict[int, float]
) -> None:
    client = {**cluster, "RAY_ADDRESS": cluster["dashboard"]}
    command = "ray job submit --working-dir . -- python launch/ray_train.py c.yaml run_dir=runs/job"
    deadline = time.monotonic() + 60
    while True:
        done = _call(*command.split(" "), env=client, cwd=project)
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = Path(cluster["HOME"]) / "distft/runs/job"
    assert f"run_dir is {run_dir} on the nodes" in done.stdout
    assert f"step {NUM_STEPS}/{NUM_STEPS} | loss {expected[NUM_STEPS]:.4f}" in done.stdout
    assert logged(run_dir) == pytest.approx(expected, abs=1e-5)


def test_submit_passes_the_exit_code_on_and_lets_paths_start_where_it_is_called(
    project: Path, cluster: Mapping[str, str]
) -> None:
    client = {**cluster, "RAY_ADDRESS": cluster["dashboard"]}
    override = "data.sources=[{path: elsewhere}]"
    done = _call("launch/submit.sh", "c.yaml", "run_dir=runs/no", override, env=client, cwd=project)
    assert done.returncode == 2
    assert "elsewhere" in done.stdout
    assert ".gitignore" not in done.stdout  # the hint for jobs whose paths start in the upload
    assert not (project / "runs/no").exists()


def test_workers_live_again_after_a_failure_but_not_after_a_mistake(
    project: Path, cluster: Mapping[str, str], expected: dict[int, float], tmp_path: Path
) -> None:
    names = ["killed_once", "bug_then_mistake"]
    done = _python(HERE / "scenarios.py", "c.yaml", tmp_path, *names, env=cluster, cwd=project, timeout_s=400)
    assert done.returncode == 0, done.stderr
    killed, mistaken = map(json.loads, _json_lines(done.stdout))

    assert (killed["exit_code"], killed["step"]) == (0, NUM_STEPS)
    assert logged(tmp_path / "killed_once") == pytest.approx(expected, abs=1e-5)
    assert (tmp_path / "killed_once/lives").read_text() == "xx"
    assert done.stderr.count("Starting the workers again (1 of 3)") == 2  # once in each run

    assert done.stderr.count("rank 1: ZeroDivisionError: a bug\nof two lines") == 1
    assert "in bug_then_mistake" in done.stderr  # the frame that raised
    assert mistaken["exit_code"] == 2
    assert mistaken["message"] == "rows.jsonl:3: this label was never seen"
    assert (tmp_path / "bug_then_mistake/lives").read_text() == "xx"


def _json_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("{")]
