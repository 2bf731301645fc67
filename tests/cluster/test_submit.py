"""Submitted runs on a real cluster: requests, results, interrupts, and bad connections."""

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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.commands import call, call_python
from support.faulty_proxy import FaultyProxy, faulty_proxy
from support.ports import free_port
from support.small_runs import logged

from distft.cluster.client.jobs import Job, JobClient
from distft.cluster.client.submit import (
    JobRequest,
    exit_code,
    follow_job,
    is_this_machine,
    make_job_id,
    make_job_request,
    run_job,
)
from distft.errors import ConfigError, LaunchError

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),  # in Ray's client
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),  # also in Ray's client
]

FEW_STEPS = ("engine={type: local}", "cluster.workers=1", "train.max_steps=3", "validation=null")
SECRETS = {"RAY_AUTH_TOKEN": "sesame-1", "WANDB_API_KEY": "sesame-2", "ANYTHING": "sesame-3"}
INTERRUPTED = """
import os, sys
from distft.cluster.client.jobs import JobClient
from distft.cluster.client.submit import JobRequest, run_job
address, job_id, *options = sys.argv[1:]
request = JobRequest(job_id=job_id, entrypoint="echo up; exec sleep 300", runtime_env={}, metadata={})
client = JobClient(address, os.environ, retry_s=120)
sys.exit(run_job(client, request, stop_on_interrupt="--stop-on-interrupt" in options))
"""


@pytest.fixture(scope="module")
def jobs(cluster: Mapping[str, str]) -> Iterator[JobClient]:
    yield JobClient(cluster["dashboard"], {}, retry_s=60)
    gc.collect()  # raises the warning above here, not in a later file


@pytest.fixture(scope="module")
def ended(jobs: JobClient) -> dict[str, Job]:
    """Jobs with different ends, oldest first; "foreign" is no run of distft."""
    metadata = {"distft": "test"}
    for job_id, command, metadata_of_job in (
        ("foreign", "exit 2", {}),
        ("saved", "exit 75", metadata),
        ("killed", "kill -9 $$", metadata),
    ):
        request = JobRequest(job_id=job_id, entrypoint=command, runtime_env={}, metadata=metadata_of_job)
        assert run_job(jobs, request, wait=False) == 0
    return {job_id: jobs.follow(job_id, lambda _: None) for job_id in ("foreign", "saved", "killed")}


def test_all_mistakes_are_reported_before_anything_is_sent(
    project: Path, environment: Mapping[str, str]
) -> None:
    with_token = {**environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "not to be sent"}
    wrong = ["cluster.wokers=2", "cluster.env={HF_TOKEN: of-mine}", "--address", "http://192.0.2.1:8265"]
    arguments = ["-m", "distft", "submit", "c.yaml", *wrong]
    done = call_python(*arguments, env=with_token, cwd=project, timeout_s=280)
    assert (done.returncode, done.stdout) == (2, "")
    for message in ("'workers'", "cluster.env=... looks like a secret", "in clear text"):
        assert message in done.stderr
    assert "of-mine" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cluster_on_this_machine_gets_no_job_whose_files_are_missing(
    project: Path, cluster: Mapping[str, str], jobs: JobClient
) -> None:
    wrong = ["c.yaml", "data.sources=[{path: elsewhere}]", "--address", cluster["dashboard"]]
    done = call_python("-m", "distft", "submit", *wrong, env=cluster, cwd=project)
    assert (done.returncode, done.stdout) == (2, "")
    assert "elsewhere" in done.stderr
    assert not [job for job in jobs.submitted() if "elsewhere" in job.entrypoint]


@pytest.fixture(scope="module")
def caller(cluster: Mapping[str, str]) -> dict[str, str]:
    """The environment of a user's shell."""
    return {**cluster, **SECRETS, "RAY_ADDRESS": cluster["dashboard"]}


@pytest.fixture(scope="module")
def submitted(project: Path, caller: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """A run submitted with --no-wait."""
    return call("launch/submit.sh", "c.yaml", *FEW_STEPS, "--no-wait", env=caller, cwd=project)


@pytest.fixture(scope="module")
def followed(
    project: Path, caller: Mapping[str, str], submitted: "subprocess.CompletedProcess[str]"
) -> "subprocess.CompletedProcess[str]":
    """`distft logs --follow` of that run, which has ended by now."""
    job_id = submitted.stdout.strip()
    return call_python("-m", "distft", "logs", job_id, "--follow", env=caller, cwd=project)


def test_submit_without_waiting_prints_the_job_id_and_how_to_follow_it(
    submitted: "subprocess.CompletedProcess[str]",
) -> None:
    assert submitted.returncode == 0, submitted.stderr
    job_id = submitted.stdout.strip()
    assert job_id.startswith("distft-small-")
    assert f"distft logs {job_id} --follow" in submitted.stderr


def test_logs_follow_a_run_to_its_end(followed: "subprocess.CompletedProcess[str]", project: Path) -> None:
    assert followed.returncode == 0, followed.stderr
    assert f"step 3/3 | loss {logged(project / 'runs/small')[3]:.4f}" in followed.stdout
    assert "INFO" not in followed.stderr  # the level at which Ray's client logs its requests


@pytest.mark.usefixtures("followed")
def test_status_shows_the_last_loss_and_event_of_a_run(
    submitted: "subprocess.CompletedProcess[str]", caller: Mapping[str, str], project: Path
) -> None:
    shown = call_python("-m", "distft", "status", submitted.stdout.strip(), env=caller, cwd=project)
    assert shown.returncode == 0, shown.stderr
    assert "SUCCEEDED" in shown.stdout
    assert str(project / "runs/small") in shown.stdout
    assert f"loss {logged(project / 'runs/small')[3]:.4f}" in shown.stdout
    assert "finish status=completed" in shown.stdout


@pytest.mark.usefixtures("followed")
def test_nothing_of_the_callers_environment_reaches_the_cluster(
    submitted: "subprocess.CompletedProcess[str]", cluster: Mapping[str, str], jobs: JobClient
) -> None:
    job_id = submitted.stdout.strip()
    with urllib.request.urlopen(f"{cluster['dashboard']}/api/jobs/{job_id}") as answer:
        known = json.load(answer)
    assert "sesame" not in json.dumps(known) + jobs.log(job_id)
    assert known["metadata"].keys() == {"distft", "config", "run_dir"}
    assert known["runtime_env"]["env_vars"].keys() == {"RAY_JOB_STOP_WAIT_TIME_S", "DISTFT_RUN_ROOT"}


def test_the_exit_code_of_a_job_is_its_drivers(ended: Mapping[str, Job]) -> None:
    assert exit_code(ended["saved"]) == 75
    assert exit_code(ended["foreign"]) == 2
    with pytest.raises(LaunchError, match="signal 9"):
        exit_code(ended["killed"])


@pytest.mark.usefixtures("ended")
def test_an_unknown_job_is_a_mistake_and_the_known_runs_are_listed(
    cluster: Mapping[str, str], project: Path
) -> None:
    environment = {**cluster, "RAY_ADDRESS": "http://192.0.2.1:8265"}  # --address takes precedence
    arguments = ["-m", "distft", "logs", "unknown", "--address", cluster["dashboard"]]
    done = call_python(*arguments, env=environment, cwd=project, timeout_s=280)
    assert (done.returncode, done.stdout) == (2, "")
    for job_id, is_named in (("unknown", True), ("saved", True), ("killed", True), ("foreign", False)):
        assert (job_id in done.stderr) is is_named


@pytest.mark.usefixtures("ended")
def test_status_lists_the_runs_of_distft_newest_first(cluster: Mapping[str, str], project: Path) -> None:
    arguments = ["-m", "distft", "status", "--json", "--address", cluster["dashboard"]]
    done = call_python(*arguments, env=cluster, cwd=project, timeout_s=280)
    rows = json.loads(done.stdout)
    assert [row["job"] for row in rows][:2] == ["killed", "saved"]
    assert [row["exit_code"] for row in rows][:2] == [-9, 75]
    assert "foreign" not in {row["job"] for row in rows}


def submit_and_interrupt(cluster: Mapping[str, str], job_id: str, *options: str) -> tuple[int, str]:
    """Interrupt a client whose job is running: the client's exit code and stderr."""
    command = [sys.executable, "-c", INTERRUPTED, cluster["dashboard"], job_id, *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=cluster, text=True
    ) as client:
        assert client.stdout is not None
        assert any(line == "up\n" for line in client.stdout)
        client.send_signal(signal.SIGINT)
        stderr = client.communicate(timeout=60)[1]
    return client.returncode, stderr


def test_an_interrupt_leaves_the_job_running(cluster: Mapping[str, str], jobs: JobClient) -> None:
    returncode, stderr = submit_and_interrupt(cluster, "interrupted-leave")
    assert returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "distft logs interrupted-leave --follow" in stderr
    assert "ray job stop interrupted-leave" in stderr
    assert jobs.get("interrupted-leave").status == "RUNNING"
    assert jobs.stop("interrupted-leave", grace_s=10).status == "STOPPED"


def test_an_interrupt_stops_the_job_on_request(cluster: Mapping[str, str], jobs: JobClient) -> None:
    returncode, stderr = submit_and_interrupt(cluster, "interrupted-stop", "--stop-on-interrupt")
    assert returncode == 130, stderr
    assert "Traceback" not in stderr
    stopped = jobs.get("interrupted-stop")
    assert stopped.status == "STOPPED"
    with pytest.raises(LaunchError, match="was stopped"):
        exit_code(stopped)


@contextlib.contextmanager
def proxied(cluster: Mapping[str, str], port: int) -> Iterator[FaultyProxy]:
    """A faulty proxy at `port` for the cluster's dashboard."""
    upstream_port = urlsplit(cluster["dashboard"]).port
    assert upstream_port is not None
    with faulty_proxy(port, upstream_port) as proxy:
        yield proxy


def test_a_dashboard_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(LaunchError, match="Connection refused"):
        JobClient(f"http://127.0.0.1:{free_port()}", {}, retry_s=0)


def test_a_client_waits_for_a_dashboard_that_is_starting(cluster: Mapping[str, str]) -> None:
    port, made = free_port(), list[JobClient]()
    thread = threading.Thread(
        target=lambda: made.append(JobClient(f"http://127.0.0.1:{port}", {}, retry_s=120))
    )
    thread.start()
    time.sleep(0.5)
    with proxied(cluster, port):
        thread.join(timeout=120)
    assert len(made) == 1


def test_a_submission_is_repeated_until_the_cluster_takes_the_job_and_answers(
    cluster: Mapping[str, str],
) -> None:
    port = free_port()
    with proxied(cluster, port) as proxy:
        client = JobClient(f"http://127.0.0.1:{port}", {}, retry_s=120)
        proxy.faults = ["no agent", "no agent", "lost answer"]
        client.submit("repeated-1", "true", runtime_env={}, metadata={})
        assert proxy.faults == []
        assert client.get("repeated-1").entrypoint == "true"


def test_a_log_stream_that_breaks_off_is_continued_without_gap_or_repetition(
    cluster: Mapping[str, str],
) -> None:
    numbers = "for i in $(seq 0 24); do echo line $i; sleep 0.15; done"
    port, shown = free_port(), list[str]()
    with proxied(cluster, port) as proxy:
        client = JobClient(f"http://127.0.0.1:{port}", {}, retry_s=120)
        client.submit("broken-1", numbers, runtime_env={}, metadata={})

        def show(text: str) -> None:
            shown.append(text)
            if "line" in text and len(shown) < 5:
                proxy.cut()

        assert exit_code(client.follow("broken-1", show, silence_s=2)) == 0
    lines = [line for line in "".join(shown).splitlines() if line.startswith("line")]
    assert lines == [f"line {i}" for i in range(25)]
    assert len(shown) >= 2  # it was cut in between


def test_a_client_that_loses_contact_prints_how_to_follow_the_job_again(
    cluster: Mapping[str, str], jobs: JobClient
) -> None:
    port = free_port()
    with proxied(cluster, port) as proxy:
        client = JobClient(f"http://127.0.0.1:{port}", {}, retry_s=1)
        client.submit("lost-1", "sleep 60", runtime_env={}, metadata={})
        proxy.server_close()
        with pytest.raises(LaunchError, match="may still be running") as raised:
            follow_job(client, "lost-1")
    assert "distft logs lost-1 --follow" in str(raised.value)
    assert jobs.stop("lost-1", grace_s=10).status == "STOPPED"


def test_a_cluster_is_on_this_machine_if_its_session_directory_is(jobs: JobClient, tmp_path: Path) -> None:
    assert is_this_machine(jobs.session_name(), os.environ)
    assert not is_this_machine("session_of_another_machine", os.environ)
    assert not is_this_machine("", os.environ)
    (tmp_path / "ray" / "session_1").mkdir(parents=True)
    assert is_this_machine("session_1", {"RAY_TMPDIR": str(tmp_path)})


class NoDashboard(BaseHTTPRequestHandler):
    """An HTTP server that is not a dashboard."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>")

    def log_message(self, *arguments: object) -> None: ...


def test_a_server_that_is_no_dashboard_is_reported_at_once() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), NoDashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ConfigError, match="is not a Ray dashboard"):
            JobClient(f"http://127.0.0.1:{server.server_port}", {}, retry_s=60)
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


def test_the_entry_point_names_the_configuration_as_the_job_finds_it(tmp_path: Path) -> None:
    def entrypoint(path: str, *, is_local: bool) -> str:
        request = make_job_request(path, ["a.b=c d"], "runs/x", root=None, cwd=tmp_path, is_local=is_local)
        return request.entrypoint.removeprefix("python -m distft.cli.ray_driver ")

    for is_local in (True, False):  # both read the upload
        assert entrypoint("c.yaml", is_local=is_local) == "c.yaml 'a.b=c d'"
        assert entrypoint(f"{tmp_path}/sub/c.yaml", is_local=is_local) == "sub/c.yaml 'a.b=c d'"
    assert entrypoint("/elsewhere/c.yaml", is_local=True) == "/elsewhere/c.yaml 'a.b=c d'"
    with pytest.raises(ConfigError, match="elsewhere"):
        entrypoint("/elsewhere/c.yaml", is_local=False)


@pytest.mark.parametrize(
    ("root", "run_dir", "expected"),
    [
        ("/shared", "runs/x", "/shared/runs/x"),
        (None, "runs/x", "~/distft/runs/x"),
        (None, "/data/runs/x", "/data/runs/x"),
    ],
)
def test_the_metadata_names_the_run_directory_on_the_nodes(
    root: str | None, run_dir: str, expected: str
) -> None:
    request = make_job_request("c.yaml", (), run_dir, root=root, cwd=Path("/here"), is_local=False)
    assert request.metadata["run_dir"] == expected
    assert ("DISTFT_RUN_ROOT" in request.runtime_env["env_vars"]) is (root is not None)
