"""A run as a job of a Ray cluster: checked here, uploaded, followed to its own exit code."""

import contextlib
import re
import secrets
import shlex
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import distft
from distft.cluster.dashboard_address import check_clear_text, choose_address
from distft.cluster.jobs import Job, Jobs
from distft.cluster.patience import NoAnswerError, tell
from distft.cluster.places import RUN_ROOT, Places
from distft.config import apply_overrides, redact
from distft.errors import ConfigError, LaunchError, Mistakes
from distft.run.config import RunConfig, load_run_config

DRIVER = ("python", "-m", "distft.cli.ray_driver")
STOP_GRACE_S = 60  # from SIGTERM to SIGKILL for the driver of a job that is stopped; Ray's own is 3
INTERRUPTED = 130  # the exit code, as shells have it

_NOT_IN_A_JOB_ID = re.compile(r"[^A-Za-z0-9._-]+")
_LONGEST_NAME = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """Everything that a cluster is told of a job besides the files of `working_dir`."""

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
    patience_s: float = 60,
) -> int:
    """Run a configuration as a job, and print what it prints; returns the run's own exit code.

    Before anything is sent, raises `ConfigError` with all faults that can be seen without the cluster;
    before the job is, also `DataError` and `CheckpointError` where the cluster is this machine. Raises
    `LaunchError` where the cluster does not take the job within `patience_s`, or the job ends without
    an exit code. `environ` is this process's environment; Ray's address is put into it.
    """
    mistakes = Mistakes()
    with mistakes.gather():
        config = load_run_config(config_path, overrides)
    with mistakes.gather():
        check_no_secrets(overrides)
    with mistakes.gather():
        url = choose_address(address, environ)
        if not allow_clear_text:
            check_clear_text(url, environ)
    mistakes.raise_if_any()
    jobs = Jobs(url, environ, patience_s=patience_s)
    root = environ.get(RUN_ROOT)
    is_here = is_this_machine(jobs.session_name(), environ)
    if is_here:
        root = str(_check_here(config, root, cwd))
    request = describe_job(config_path, overrides, config.run_dir, root=root, cwd=cwd, is_here=is_here)
    return run_job(jobs, request, stop_on_interrupt=stop_on_interrupt, wait=wait)


def check_no_secrets(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for what looks like one: whoever may look at the cluster sees command lines."""
    faults = []
    for override in overrides:
        key, _, text = override.partition("=")
        name = key.rpartition(".")[2]
        with contextlib.suppress(ConfigError):  # is told where the configuration is read
            plain = apply_overrides({}, [f"{name if name.isidentifier() else 'value'}={text}"])
            if redact(plain) != plain:
                faults.append(
                    f"{key}=... looks like a secret, and a job's command line is shown to whoever sees the "
                    "cluster: set it in the environment of the nodes."
                )
    if faults:
        raise ConfigError("\n".join(faults))


def is_this_machine(session_name: str, environ: Mapping[str, str]) -> bool:
    """Whether the head of that session runs here: its directory is seen. Addresses do not tell: tunnels."""
    places = {environ.get(name) for name in ("RAY_TMPDIR", "TMPDIR")} | {"/tmp"}  # as Ray's own
    return bool(session_name) and any(Path(place, "ray", session_name).is_dir() for place in places if place)


def describe_job(
    config_path: str, overrides: Sequence[str], run_dir: str, *, root: str | None, cwd: Path, is_here: bool
) -> JobRequest:
    """The request for a run. Of the caller's environment it holds nothing but `root`.

    Raises `ConfigError` for a configuration that the cluster would not find.
    """
    path = cwd / config_path
    if path.is_relative_to(cwd):
        path = path.relative_to(cwd)  # the job reads the copy that was uploaded
    elif not is_here:
        raise ConfigError(
            f"{config_path} is outside of {cwd}, which is what the cluster is sent: copy it there, or call "
            "this in a directory that holds it."
        )
    runs = Places(working_dir=cwd, run_root=Path(root or "~/distft"), is_uploaded=root is None)
    env_vars = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)}
    return JobRequest(
        job_id=make_job_id(run_dir, secrets.token_hex(3)),
        entrypoint=shlex.join([*DRIVER, str(path), *overrides]),
        runtime_env={
            "working_dir": str(cwd),
            "env_vars": env_vars if root is None else {**env_vars, RUN_ROOT: root},
        },
        metadata=redact(
            {"distft": distft.__version__, "config": str(config_path), "run_dir": runs.outlasting(run_dir)}
        ),
    )


def make_job_id(run_dir: str, suffix: str) -> str:
    """`distft-<name of the run>-<suffix>`, in letters that URLs and file names take."""
    name = _NOT_IN_A_JOB_ID.sub("-", PurePath(run_dir).name)[:_LONGEST_NAME].strip("-.")
    return f"distft-{name or 'run'}-{suffix}"


def run_job(jobs: Jobs, request: JobRequest, *, stop_on_interrupt: bool = False, wait: bool = True) -> int:
    """Submit, follow, and return the exit code; without `wait` 0, and the job's id on stdout.

    Ctrl-C leaves the job to itself, or stops it first.
    """
    is_submitted = False
    try:
        jobs.submit(
            request.job_id, request.entrypoint, runtime_env=request.runtime_env, metadata=request.metadata
        )
        is_submitted = True
        if not wait:
            print(request.job_id, flush=True)
            tell(_ways_on(jobs, request.job_id))
            return 0
        tell(f"Submitted {request.job_id} to {jobs.address}.")
        return follow_to_the_end(jobs, request.job_id)
    except KeyboardInterrupt:
        if not is_submitted and jobs.find(request.job_id) is None:
            tell("Interrupted before the job was submitted.")
        elif stop_on_interrupt:
            tell(f"Interrupted: stopping {request.job_id}; it has {STOP_GRACE_S} s to save its state.")
            tell(f"{request.job_id}: {jobs.stop(request.job_id, grace_s=STOP_GRACE_S).state}.")
        else:
            tell(f"Interrupted, but {request.job_id} goes on.\n{_ways_on(jobs, request.job_id)}")
        return INTERRUPTED


def follow_to_the_end(jobs: Jobs, job_id: str) -> int:
    """Print what the job has printed and still prints; returns the driver's exit code."""
    try:
        job = jobs.follow(job_id, _show)
    except NoAnswerError as error:
        raise NoAnswerError(f"{error}\n{job_id} may go on by itself.\n{_ways_on(jobs, job_id)}") from None
    return exit_code(job)


def exit_code(job: Job) -> int:
    """The driver's own. Raises `LaunchError` where it did not live to give one."""
    if job.exit_code is not None and job.exit_code >= 0:
        return job.exit_code
    if job.exit_code is not None:
        fate = f"its driver was killed by signal {-job.exit_code}"
    elif job.state == "STOPPED":
        fate = "it was stopped"
    else:
        fate = f"it {job.state.lower()}: {job.message.strip()}"
    raise LaunchError(f"{job.job_id}: {fate}. Submitted again, the run goes on from its last commit.")


def _check_here(config: RunConfig, root: str | None, cwd: Path) -> Path:
    """What the driver would check on this machine, before it is sent; returns where relative paths start."""
    from distft.cluster.ray_job import check  # seconds of imports

    places = Places.find({RUN_ROOT: root or str(cwd)}, cwd=cwd, home=cwd)
    with contextlib.chdir(places.working_dir):
        check(config)
    return places.working_dir


def _ways_on(jobs: Jobs, job_id: str) -> str:
    return (
        f"To look: distft status {job_id} --address {jobs.address}\n"
        f"         distft logs {job_id} --follow --address {jobs.address}\n"
        f"To stop: ray job stop {job_id} --address {jobs.address}"
    )


def _show(text: str) -> None:
    print(text, end="", flush=True)
