"""Runs on real Ray: one of this machine's own, and a cluster of two nodes that takes jobs."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from cluster_nodes import call, call_python
from small_runs import logged, pretraining, run

from distft.cluster.ray_job import check
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


def test_mistakes_are_told_before_a_cluster_is_looked_for(
    project: Path, environment: Mapping[str, str]
) -> None:
    nowhere = {**environment, "RAY_ADDRESS": "192.0.2.1:6379"}  # to look for it would take minutes
    faults = ["cluster.wokers=2", "data.sources=[{path: elsewhere}]"]
    done = call_python("launch/ray_train.py", "c.yaml", *faults, env=nowhere, cwd=project, timeout_s=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "workers" in done.stderr
    done = call_python("launch/ray_train.py", "c.yaml", faults[1], env=nowhere, cwd=project, timeout_s=60)
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
    done = call_python("launch/ray_train.py", "c.yaml", env=environment, cwd=project)
    assert done.returncode == 0, done.stderr
    assert logged(project / "runs/small") == pytest.approx(expected, abs=1e-5)
    assert "start | step 0 | world size 2 | engine zero" in done.stdout
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
        done = call(*command.split(" "), env=client, cwd=project)
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = Path(cluster["HOME"]) / "distft/runs/job"
    assert f"run_dir is {run_dir} on the nodes" in done.stdout
    assert f"step {NUM_STEPS}/{NUM_STEPS} | loss {expected[NUM_STEPS]:.4f}" in done.stdout
    assert logged(run_dir) == pytest.approx(expected, abs=1e-5)


def test_what_finds_no_room_ends_with_what_was_asked_for_and_what_there_is(
    project: Path, cluster: Mapping[str, str]
) -> None:
    asked = ["cluster.workers=3", "cluster.start_timeout_s=4", "run_dir=runs/no_room"]
    done = call_python("launch/ray_train.py", "c.yaml", *asked, env=cluster, cwd=project, timeout_s=120)
    assert done.returncode == 1, done.stderr
    assert "asked for are 3 workers with 1 CPUs and 0 GPUs each; there are 2 nodes with 2 CPUs" in done.stderr
    assert "Traceback" not in done.stderr


def test_workers_live_again_after_a_failure_but_not_after_a_mistake(
    project: Path, cluster: Mapping[str, str], expected: dict[int, float], tmp_path: Path
) -> None:
    names = ["killed_once", "bug_then_mistake"]
    done = call_python(
        HERE / "scenarios.py", "c.yaml", tmp_path, *names, env=cluster, cwd=project, timeout_s=400
    )
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
