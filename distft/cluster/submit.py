"""`ray job submit` for a run, with its own exit code: `python -m distft.cluster.submit CONFIG [KEY=VALUE]...`

RAY_ADDRESS is that of the cluster's dashboard, http://127.0.0.1:8265 unless set. The directory that this is
called in is uploaded. Relative paths of the configuration start in DISTFT_RUN_ROOT on the nodes; for a
cluster on this machine that is this directory itself, unless set.
"""

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.job_submission import JobSubmissionClient

from distft.cluster.places import RUN_ROOT
from distft.errors import DistftError, LaunchError

_DASHBOARD = "http://127.0.0.1:8265"
_NO_AGENT_YET = "No available agent"  # for some seconds after a head has started


def submit(arguments: Sequence[str], *, environ: Mapping[str, str], cwd: Path, patience_s: float = 60) -> int:
    """Run `launch/ray_train.py` as a job, print what it prints; returns its exit code.

    Raises `LaunchError` where no cluster takes the job within `patience_s`.
    """
    address = environ.get("RAY_ADDRESS") or _DASHBOARD
    root = environ.get(RUN_ROOT)
    if root is None and urlsplit(address).hostname in {"127.0.0.1", "localhost", "::1"}:
        root = str(cwd)
    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LaunchError(
            f"No Ray dashboard answers at {address} ({str(error).splitlines()[0]}). Start a cluster "
            "(`ray start --head`), or set RAY_ADDRESS to its dashboard's http address."
        ) from None
    runtime_env: dict[str, Any] = {
        "working_dir": str(cwd),
        "env_vars": {} if root is None else {RUN_ROOT: root},
    }
    job = _submit_patiently(
        client, shlex.join(["python", "launch/ray_train.py", *arguments]), runtime_env, patience_s
    )
    print(f"Job {job}; to stop it: ray job stop --address {address} {job}", flush=True)
    asyncio.run(_follow(client, job))
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    info = client.get_job_info(job)
    if info.driver_exit_code is None:
        raise LaunchError(f"Job {job} ended as {info.status}: {info.message}")
    return int(info.driver_exit_code)


def _submit_patiently(
    client: JobSubmissionClient, entrypoint: str, runtime_env: dict[str, Any], patience_s: float
) -> str:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env))
        except RuntimeError as error:
            if _NO_AGENT_YET not in str(error) or time.monotonic() > deadline:
                raise LaunchError(f"The cluster did not take the job: {error}") from None
        time.sleep(1)


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit code."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(__doc__)
        return 0 if arguments else 2
    try:
        return submit(arguments, environ=os.environ, cwd=Path.cwd())
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
