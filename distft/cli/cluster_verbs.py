"""`distft submit`, `status` and `logs`: start and observe runs on a Ray cluster from outside of it."""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distft.cli.arguments import ConfigPath, Overrides

if TYPE_CHECKING:
    from distft.cluster.client.jobs import JobClient

_RETRY_S = 10.0  # for `status` and `logs`; only `submit` waits for a head that is just starting

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="The cluster's dashboard; default: RAY_ADDRESS, or http://127.0.0.1:8265."
    ),
]
AllowClearText = Annotated[
    bool,
    typer.Option(
        "--allow-clear-text-token", help="Send the cluster's token even over an unencrypted connection."
    ),
]
JobId = Annotated[
    str, typer.Argument(metavar="JOB", help="The job's id, which `distft submit` and `status` print.")
]


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    stop_on_interrupt: Annotated[
        bool,
        typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job; without this option it continues."),
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the job's id and return at once.")
    ] = False,
    allow_clear_text_token: AllowClearText = False,
) -> None:
    """Train CONFIG on a Ray cluster: upload this directory, print the run's log, return its exit code.

    Relative paths are relative to DISTFT_RUN_ROOT on the nodes. If it is not set, and this machine is the
    cluster's head, they are relative to this directory.
    """
    from distft.cluster.client.submit import submit as submit_run

    code = submit_run(
        config,
        overrides or (),
        address=address,
        environ=os.environ,
        cwd=Path.cwd(),
        allow_clear_text=allow_clear_text_token,
        stop_on_interrupt=stop_on_interrupt,
        wait=not no_wait,
    )
    raise typer.Exit(code)


def status(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="A job's id; default: list all runs of distft.")
    ] = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    allow_clear_text_token: AllowClearText = False,
) -> None:
    """List the runs of a cluster, newest first, or show the status of one."""
    client = _connect(address, allow_clear_text_token)
    from distft.cluster.client import status as job_status

    now = time.time()
    if job is None:
        rows = [
            job_status.describe(one, now=now) for one in client.submitted() if job_status.is_distft_run(one)
        ]
        print(json.dumps(rows, indent=1) if as_json else "\n".join(job_status.format_table(rows)))
        return
    found = job_status.require_job(client, job)
    row, latest = job_status.describe(found, now=now), job_status.latest_of_run(found)
    if as_json:
        print(json.dumps({**row, **(latest or {"metrics": None, "events": None})}, indent=1))
    else:
        print("\n".join(job_status.format_job(row, latest)))


def logs(
    job: JobId,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Follow the log until the run ends, and return its exit code."),
    ] = False,
    address: Address = None,
    allow_clear_text_token: AllowClearText = False,
) -> None:
    """Print the output of a submitted run."""
    client = _connect(address, allow_clear_text_token)
    from distft.cluster.client import status as job_status
    from distft.cluster.client.submit import follow_job

    job_status.require_job(client, job)
    if follow:
        raise typer.Exit(follow_job(client, job))
    sys.stdout.write(client.log(job))


def _connect(address: str | None, allow_clear_text: bool) -> "JobClient":
    from distft.cluster.client.address import check_clear_text, choose_address

    url = choose_address(address, os.environ)
    if not allow_clear_text:
        check_clear_text(url, os.environ)
    from distft.cluster.client.jobs import JobClient

    return JobClient(url, os.environ, retry_s=_RETRY_S)
