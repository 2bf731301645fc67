"""Submitted runs on a real cluster: what is sent, what comes back, and what becomes of a bad connection."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cluster_nodes import call, call_python, free_port
from faulty_proxy import faulty_proxy
from small_runs import logged

from distft.cluster.jobs import Job, Jobs
from distft.cluster.submit import (
    JobRequest,
    describe_job,
    exit_code,
    follow_to_the_end,
    is_this_machine,
    make_job_id,
    run_job,
)
from distft.errors import ConfigError, LaunchError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),  # in Ray's client
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),  # by the same
]

FEW_STEPS = ("engine={type: local}", "cluster.workers=1", "train.max_steps=3", "validation=null")
INTERRUPTED = """
import os, sys
from distft.cluster.jobs import Job, Jobs
from distft.cluster.submit import JobRequest, run_job
address, job_id, stop = sys.argv[1:]
request = JobRequest(job_id=job_id, entrypoint="echo up; exec sleep 300", runtime_env={}, metadata={})
jobs = Jobs(address, os.environ, patience_s=30)
sys.exit(run_job(jobs, request, stop_on_interrupt=stop == "stop"))
"""


@pytest.fixture(scope="module")
def jobs(cluster: Mapping[str, str]) -> Iterator[Jobs]:
    yield Jobs(cluster["dashboard"], {}, patience_s=60)
    gc.collect()  # that no later file is blamed for the warning above


@pytest.fixture(scope="module")
def ended(jobs: Jobs) -> dict[str, Job]:
    """Jobs that came to different ends, oldest first; one is none of distft's."""
    ours = {"distft": "test"}
    for job_id, command, metadata in (
        ("foreign", "exit 2", {}),
        ("saved", "exit 75", ours),
        ("killed", "kill -9 $$", ours),
    ):
        request = JobRequest(job_id=job_id, entrypoint=command, runtime_env={}, metadata=metadata)
        assert run_job(jobs, request, wait=False) == 0
    return {job_id: jobs.follow(job_id, lambda _: None) for job_id in ("foreign", "saved", "killed")}


def test_every_mistake_is_told_before_anything_is_sent(project: Path, environment: Mapping[str, str]) -> None:
    with_token = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "not to be sent"}
    wrong = ["cluster.wokers=2", "cluster.env={HF_TOKEN: of-mine}", "--address", "http://192.0.2.1:8265"]
    arguments = ["-m", "distft", "submit", "c.yaml", *wrong]
    done = call_python(*arguments, env=with_token, cwd=project, timeout_s=60)
    assert (done.returncode, done.stdout) == (2, "")
    for told in ("'workers'", "cluster.env=... looks like a secret", "in clear text"):
        assert told in done.stderr
    assert "of-mine" not in done.stderr
    assert "Traceback" not in done.stderr


def test_on_this_machine_the_files_are_looked_at_before_a_job_is_made(
    project: Path, cluster: Mapping[str, str], jobs: Jobs
) -> None:
    wrong = ["c.yaml", "data.sources=[{path: elsewhere}]", "--address", cluster["dashboard"]]
    done = call_python("-m", "distft", "submit", *wrong, env=cluster, cwd=project)
    assert (done.returncode, done.stdout) == (2, "")
    assert "elsewhere" in done.stderr
    assert not [job for job in jobs.submitted() if "elsewhere" in job.entrypoint]


def test_a_run_is_submitted_looked_at_and_followed(
    project: Path, cluster: Mapping[str, str], jobs: Jobs
) -> None:
    """And nothing of the caller's environment goes with it."""
    secrets = {"RAY_AUTH_TOKEN": "sesame-1", "WANDB_API_KEY": "sesame-2", "ANYTHING": "sesame-3"}
    client = {**cluster, **secrets, "RAY_ADDRESS": cluster["dashboard"]}
    submitted = call("launch/submit.sh", "c.yaml", *FEW_STEPS, "--no-wait", env=client, cwd=project)
    assert submitted.returncode == 0, submitted.stderr
    job_id = submitted.stdout.strip()
    assert job_id.startswith("distft-small-")
    assert f"distft logs {job_id} --follow" in submitted.stderr

    followed = call_python("-m", "distft", "logs", job_id, "--follow", env=client, cwd=project)
    run_dir = project / "runs/small"
    assert followed.returncode == 0, followed.stderr
    assert f"step 3/3 | loss {logged(run_dir)[3]:.4f}" in followed.stdout
    assert "INFO" not in followed.stderr  # what Ray's client tells of its doings

    shown = call_python("-m", "distft", "status", job_id, env=client, cwd=project)
    assert shown.returncode == 0, shown.stderr
    assert "SUCCEEDED" in shown.stdout
    assert str(run_dir) in shown.stdout
    assert f"loss {logged(run_dir)[3]:.4f}" in shown.stdout
    assert "finish status=completed" in shown.stdout

    with urllib.request.urlopen(f"{cluster['dashboard']}/api/jobs/{job_id}") as answer:
        known = json.load(answer)
    assert "sesame" not in json.dumps(known) + jobs.log(job_id)
    assert known["metadata"].keys() == {"distft", "config", "run_dir"}
    assert known["runtime_env"]["env_vars"].keys() == {"RAY_JOB_STOP_WAIT_TIME_S", "DISTFT_RUN_ROOT"}


def test_a_job_passes_the_drivers_exit_code_on(ended: Mapping[str, Job]) -> None:
    assert exit_code(ended["saved"]) == 75
    assert exit_code(ended["foreign"]) == 2
    with pytest.raises(LaunchError, match="signal 9"):
        exit_code(ended["killed"])


def test_an_unknown_job_is_a_mistake_and_the_known_ones_are_named(
    ended: Mapping[str, Job], cluster: Mapping[str, str], project: Path
) -> None:
    assert ended
    client = {**cluster, "RAY_ADDRESS": "http://192.0.2.1:8265"}  # --address comes first
    here = {"env": client, "cwd": project, "timeout_s": 60}
    done = call_python("-m", "distft", "logs", "unknown", "--address", cluster["dashboard"], **here)
    assert (done.returncode, done.stdout) == (2, "")
    for job_id, is_named in (("unknown", True), ("saved", True), ("killed", True), ("foreign", False)):
        assert (job_id in done.stderr) is is_named

    done = call_python("-m", "distft", "status", "--json", "--address", cluster["dashboard"], **here)
    rows = json.loads(done.stdout)
    assert [row["job"] for row in rows][:2] == ["killed", "saved"]  # the newest first
    assert [row["exit_code"] for row in rows][:2] == [-9, 75]
    assert "foreign" not in {row["job"] for row in rows}


def test_an_interrupt_leaves_the_job_or_stops_it(cluster: Mapping[str, str], jobs: Jobs) -> None:
    told = {}
    with contextlib.ExitStack() as clients:
        started = {
            stop: clients.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", INTERRUPTED, cluster["dashboard"], f"interrupted-{stop}", stop],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=cluster,
                    text=True,
                )
            )
            for stop in ("stop", "leave")
        }
        for client in started.values():
            assert client.stdout is not None
            assert any(line == "up\n" for line in client.stdout)
            client.send_signal(signal.SIGINT)
        for stop, client in started.items():
            told[stop] = client.communicate(timeout=60)[1]
            assert client.returncode == 130, told[stop]
            assert "Traceback" not in told[stop]

    stopped, left = jobs.get("interrupted-stop"), jobs.get("interrupted-leave")
    assert (stopped.state, left.state) == ("STOPPED", "RUNNING")
    assert "distft logs interrupted-leave --follow" in told["leave"]
    assert "ray job stop interrupted-leave" in told["leave"]
    assert jobs.stop("interrupted-leave", grace_s=10).state == "STOPPED"
    with pytest.raises(LaunchError, match="was stopped"):
        exit_code(stopped)


def test_a_head_that_is_just_starting_is_waited_for(cluster: Mapping[str, str]) -> None:
    """Nobody listens; then no agent takes jobs; then an answer is lost on its way back."""
    port, upstream_port = free_port(), urlsplit(cluster["dashboard"]).port
    assert upstream_port is not None
    with pytest.raises(LaunchError, match="Connection refused"):
        Jobs(f"http://127.0.0.1:{port}", {}, patience_s=0)
    found: list[Jobs] = []
    early = threading.Thread(target=lambda: found.append(Jobs(f"http://127.0.0.1:{port}", {}, patience_s=30)))
    early.start()
    time.sleep(0.5)
    with faulty_proxy(port, upstream_port) as proxy:
        early.join(timeout=30)
        proxy.faults = ["no agent", "no agent", "lost answer"]
        found[0].submit("patient-1", "true", runtime_env={}, metadata={})
        assert proxy.faults == []
        assert found[0].get("patient-1").entrypoint == "true"


def test_a_stream_that_breaks_off_goes_on_where_it_was(cluster: Mapping[str, str]) -> None:
    numbers = "for i in $(seq 0 24); do echo line $i; sleep 0.15; done"
    port, upstream_port = free_port(), urlsplit(cluster["dashboard"]).port
    assert upstream_port is not None
    told: list[str] = []
    with faulty_proxy(port, upstream_port) as proxy:
        jobs = Jobs(f"http://127.0.0.1:{port}", {}, patience_s=30)
        jobs.submit("broken-1", numbers, runtime_env={}, metadata={})

        def show(text: str) -> None:
            told.append(text)
            if "line" in text and len(told) < 5:
                proxy.cut()

        assert exit_code(jobs.follow("broken-1", show, silence_s=2)) == 0
    lines = [line for line in "".join(told).splitlines() if line.startswith("line")]
    assert lines == [f"line {i}" for i in range(25)]
    assert len(told) >= 2  # it was cut in between


def test_where_contact_is_lost_the_ways_back_are_told(cluster: Mapping[str, str], jobs: Jobs) -> None:
    port, upstream_port = free_port(), urlsplit(cluster["dashboard"]).port
    assert upstream_port is not None
    with faulty_proxy(port, upstream_port) as proxy:
        far = Jobs(f"http://127.0.0.1:{port}", {}, patience_s=1)
        far.submit("lost-1", "sleep 60", runtime_env={}, metadata={})
        proxy.server_close()
        with pytest.raises(LaunchError, match="may go on by itself") as told:
            follow_to_the_end(far, "lost-1")
    assert "distft logs lost-1 --follow" in str(told.value)
    assert jobs.stop("lost-1", grace_s=10).state == "STOPPED"


def test_a_cluster_is_on_this_machine_where_its_heads_directory_is(jobs: Jobs, tmp_path: Path) -> None:
    assert is_this_machine(jobs.session_name(), os.environ)
    assert not is_this_machine("session_of_another_machine", os.environ)
    assert not is_this_machine("", os.environ)
    (tmp_path / "ray" / "session_1").mkdir(parents=True)
    assert is_this_machine("session_1", {"RAY_TMPDIR": str(tmp_path)})


def test_a_port_of_something_else_is_told_at_once() -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ConfigError, match="is not a Ray dashboard"):
            Jobs(f"http://127.0.0.1:{server.server_port}", {}, patience_s=60)
        server.shutdown()


@pytest.mark.parametrize(
    ("run_dir", "job_id"),
    [
        ("runs/mine", "distft-mine-0a1b2c"),
        ("/shared/größer als/1 2/", "distft-1-2-0a1b2c"),
        ("s3://bucket/a.b_c", "distft-a.b_c-0a1b2c"),
        (".", "distft-run-0a1b2c"),
        ("runs/" + "x" * 99, f"distft-{'x' * 40}-0a1b2c"),
    ],
)
def test_a_job_is_named_after_its_run(run_dir: str, job_id: str) -> None:
    assert make_job_id(run_dir, "0a1b2c") == job_id


def test_a_configuration_is_found_where_the_job_runs(tmp_path: Path) -> None:
    def entrypoint(path: str, *, is_here: bool) -> str:
        made = describe_job(path, ["a.b=c d"], "runs/x", root=None, cwd=tmp_path, is_here=is_here)
        return made.entrypoint.removeprefix("python -m distft.cli.ray_driver ")

    for is_here in (True, False):  # in the upload
        assert entrypoint("c.yaml", is_here=is_here) == "c.yaml 'a.b=c d'"
        assert entrypoint(f"{tmp_path}/sub/c.yaml", is_here=is_here) == "sub/c.yaml 'a.b=c d'"
    assert entrypoint("/elsewhere/c.yaml", is_here=True) == "/elsewhere/c.yaml 'a.b=c d'"
    with pytest.raises(ConfigError, match="elsewhere"):
        entrypoint("/elsewhere/c.yaml", is_here=False)


@pytest.mark.parametrize(
    ("root", "run_dir", "expected"),
    [
        ("/shared", "runs/x", "/shared/runs/x"),
        (None, "runs/x", "~/distft/runs/x"),
        (None, "/data/runs/x", "/data/runs/x"),
    ],
)
def test_a_job_carries_where_its_run_is_found(root: str | None, run_dir: str, expected: str) -> None:
    made = describe_job("c.yaml", (), run_dir, root=root, cwd=Path("/here"), is_here=False)
    assert made.metadata["run_dir"] == expected
    assert ("DISTFT_RUN_ROOT" in made.runtime_env["env_vars"]) is (root is not None)
