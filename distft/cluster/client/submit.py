"""Submits a run as a job of a Ray cluster: checks it on this machine, uploads it, follows it to its end."""

import contextlib
import re
import secrets
import shlex
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import distft
from distft.cluster.client.address import check_clear_text, choose_address
from distft.cluster.paths import RUN_ROOT, RunPaths
from distft.config import apply_overrides, redact
from distft.errors import ConfigError, ErrorCollector, Interrupted, LaunchError
from distft.run.config import RunConfig, load_run_config

if TYPE_CHECKING:  # Ray's client takes 1.5 s to import: mistakes are reported before
    from distft.cluster.client.jobs import Job, JobClient

DRIVER = ("python", "-m", "distft.cli.ray_driver")
STOP_GRACE_S = 60  # between SIGTERM and SIGKILL for the driver of a job that is stopped; Ray's default is 3
INTERRUPTED = Interrupted.exit_code
_SHELL_SIGNAL = 128
_LOG_TAIL = "last available logs"  # in Ray's messages

_NOT_IN_A_JOB_ID = re.compile(r"[^A-Za-z0-9._-]+")
_MAX_NAME_CHARS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """A request to start a job, without the files of the working directory."""

    job_id: str
    entrypoint: str
    runtime_env: Mapping[str, Any]
    metadata: Mapping[str, str]


def submit(
    config_path: str,
    overrides: Sequence[str],
    *,
    address: str | None,
    environ: MutableMapping[str, str],
    cwd: Path,
    allow_clear_text: bool = False,
    stop_on_interrupt: bool = False,
    wait: bool = True,
    retry_s: float = 60,
) -> int:
    """Run a configuration as a job and print its output; returns the run's own exit code.

    Raises `ConfigError` with all errors that can be found without the cluster before anything is sent. If the
    cluster's head is this machine, also checks the run's files before the job is made (`DataError`,
    `CheckpointError`). Raises `LaunchError` if the cluster does not accept the job within `retry_s`, or the
    job ends without an exit code. `environ` is this process's environment; Ray's address is put into it.
    """
    errors = ErrorCollector()
    with errors.collect():
        config = load_run_config(config_path, overrides)
    with errors.collect():
        check_no_secrets(overrides)
    with errors.collect():
        url = choose_address(address, environ)
        if not allow_clear_text:
            check_clear_text(url, environ)
    errors.raise_if_any()
    from distft.cluster.client.jobs import JobClient

    client = JobClient(url, environ, retry_s=retry_s)
    root = environ.get(RUN_ROOT)
    is_local = is_this_machine(client.session_name(), environ)
    if is_local:
        root = str(_check_run(config, root, cwd))
    request = make_job_request(config_path, overrides, config.run_dir, root=root, cwd=cwd, is_local=is_local)
    return run_job(client, request, stop_on_interrupt=stop_on_interrupt, wait=wait)


def check_no_secrets(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` if an override looks like a secret: everyone on the cluster sees command lines."""
    problems = []
    for override in overrides:
        key, _, text = override.partition("=")
        name = key.rpartition(".")[2]
        with contextlib.suppress(ConfigError):  # reported when the configuration is read
            plain = apply_overrides({}, [f"{name if name.isidentifier() else 'value'}={text}"])
            if redact(plain) != plain:
                problems.append(
                    f"{key}=... looks like a secret, and everyone on the cluster can read a job's command "
                    "line: set it in the environment of the nodes."
                )
    if problems:
        raise ConfigError("\n".join(problems))


def is_this_machine(session_name: str, environ: Mapping[str, str]) -> bool:
    """Whether the session's directory exists here. The address cannot show it: it may be that of a tunnel."""
    folders = {environ.get(name) for name in ("RAY_TMPDIR", "TMPDIR")} | {"/tmp"}  # as Ray chooses
    return bool(session_name) and any(
        Path(folder, "ray", session_name).is_dir() for folder in folders if folder
    )


def make_job_request(
    config_path: str, overrides: Sequence[str], run_dir: str, *, root: str | None, cwd: Path, is_local: bool
) -> JobRequest:
    """The request for a run. Of the caller's environment it contains only `root`.

    Raises `ConfigError` for a configuration outside of `cwd`, unless the cluster's head is this machine.
    """
    path = cwd / config_path
    if path.is_relative_to(cwd):
        path = path.relative_to(cwd)  # the job reads the uploaded copy
    elif not is_local:
        raise ConfigError(
            f"{config_path} is outside of {cwd}, the directory that is uploaded: copy it there, or call this "
            "in a directory that contains it."
        )
    paths = RunPaths(working_dir=cwd, run_root=Path(root or "~/distft"), is_uploaded=root is None)
    env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)}
    return JobRequest(
        job_id=make_job_id(run_dir, secrets.token_hex(3)),
        entrypoint=shlex.join([*DRIVER, str(path), *overrides]),
        runtime_env={
            "working_dir": str(cwd),
            "env_vars": env_vars if root is None else {**env_vars, RUN_ROOT: root},
        },
        metadata=redact(
            {
                "distft": distft.__version__,
                "config": str(config_path),
                "run_dir": paths.output_path(run_dir),
            }
        ),
    )


def make_job_id(run_dir: str, suffix: str) -> str:
    """`distft-<name of the run>-<suffix>`, in characters that are safe in URLs and file names."""
    name = _NOT_IN_A_JOB_ID.sub("-", PurePath(run_dir).name)[:_MAX_NAME_CHARS].strip("-.")
    return f"distft-{name or 'run'}-{suffix}"


def run_job(
    client: "JobClient", request: JobRequest, *, stop_on_interrupt: bool = False, wait: bool = True
) -> int:
    """Submit a job, follow it, and return its exit code; without `wait`, print the job's id and return 0.

    Ctrl-C leaves the job running, or with `stop_on_interrupt` stops it first.
    """
    from distft.cluster.client.retry import print_to_stderr

    is_submitted = False
    try:
        client.submit(
            request.job_id, request.entrypoint, runtime_env=request.runtime_env, metadata=request.metadata
        )
        is_submitted = True
        if not wait:
            print(request.job_id, flush=True)
            print_to_stderr(_commands_for(client, request.job_id))
            return 0
        print_to_stderr(f"Submitted {request.job_id} to {client.address}.")
        return follow_job(client, request.job_id)
    except KeyboardInterrupt:
        if not is_submitted and client.find(request.job_id) is None:
            print_to_stderr("Interrupted before the job was submitted.")
        elif stop_on_interrupt:
            print_to_stderr(
                f"Interrupted: stopping {request.job_id}, which has {STOP_GRACE_S} s to save its state."
            )
            job = client.stop(request.job_id, grace_s=STOP_GRACE_S)
            print_to_stderr(f"{job.job_id}: {job.status}.")
        else:
            print_to_stderr(
                f"Interrupted, but {request.job_id} continues.\n{_commands_for(client, request.job_id)}"
            )
        return INTERRUPTED


def follow_job(client: "JobClient", job_id: str) -> int:
    """Print the job's whole output until it ends; returns the driver's exit code."""
    from distft.cluster.client.retry import ClusterUnreachableError

    try:
        job = client.follow(job_id, _show)
    except ClusterUnreachableError as error:
        raise ClusterUnreachableError(
            f"{error}\n{job_id} may still be running.\n{_commands_for(client, job_id)}"
        ) from None
    return exit_code(job)


def exit_code(job: "Job") -> int:
    """The driver's own exit code. Raises `LaunchError` if the driver was killed or never ran."""
    code = job.exit_code
    if code is not None and (0 <= code <= _SHELL_SIGNAL or code == INTERRUPTED):
        return code
    if code is not None:  # the shell of the entry point gives 128 + N for a signal N, Python -N
        problem = f"its driver was killed by signal {-code if code < 0 else code - _SHELL_SIGNAL}"
    elif job.status == "STOPPED":
        problem = "it was stopped"
    else:
        # Ray's message may end with the end of the log, which has been printed.
        problem = f"it {job.status.lower()}: {job.message.partition(_LOG_TAIL)[0].strip(' ,:')}"
    raise LaunchError(f"{job.job_id}: {problem}. Submit the run again: it resumes from its last checkpoint.")


def _check_run(config: RunConfig, root: str | None, cwd: Path) -> Path:
    """Check the run on this machine as its driver would; returns the directory where relative paths start."""
    from distft.cluster.driver.driver import check_run

    paths = RunPaths.find({RUN_ROOT: root or str(cwd)}, cwd=cwd, home=cwd)
    with contextlib.chdir(paths.working_dir):
        check_run(config)
    return paths.working_dir


def _commands_for(client: "JobClient", job_id: str) -> str:
    """Commands with which the user can look at the job and stop it."""
    return (
        f"To look: distft status {job_id} --address {client.address}\n"
        f"         distft logs {job_id} --follow --address {client.address}\n"
        f"To stop: ray job stop {job_id} --address {client.address}"
    )


def _show(text: str) -> None:
    print(text, end="", flush=True)
