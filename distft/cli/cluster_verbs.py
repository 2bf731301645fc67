"""`distft submit`, `status` and `logs`: runs on a Ray cluster, from outside of it."""

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distft.cli.config_verbs import ConfigPath, Overrides

if TYPE_CHECKING:
    from distft.cluster.jobs import Jobs

_PATIENCE_S = 10.0  # to look at what is there; a head that is just starting is waited for in `submit` alone

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="The cluster's dashboard; RAY_ADDRESS, or http://127.0.0.1:8265, unless given."
    ),
]
AllowClearText = Annotated[
    bool,
    typer.Option("--allow-clear-text-token", help="Send the cluster's token even where others can read it."),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="As `distft submit` and `status` name it.")]


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Address = None,
    stop_on_interrupt: Annotated[
        bool, typer.Option("--stop-on-interrupt", help="Ctrl-C stops the job; without this it goes on.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Print the job's id, and do not wait for its end.")
    ] = False,
    allow_clear_text_token: AllowClearText = False,
) -> None:
    """Train as CONFIG says on a Ray cluster: uploads this directory, shows its log, gives its exit code.

    Relative paths start in DISTFT_RUN_ROOT on the nodes; for a cluster on this machine in this directory,
    unless set.
    """
    from distft.cluster.submit import submit as submit_run

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
        str | None, typer.Argument(metavar="[JOB]", help="One job; all of distft's if left out.")
    ] = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    allow_clear_text_token: AllowClearText = False,
) -> None:
    """Tell which runs a cluster has, newest first, or how one of them is doing."""
    from distft.cluster import job_status

    jobs = _jobs(address, allow_clear_text_token)
    now = time.time()
    if job is None:
        rows = [job_status.facts(found, now=now) for found in jobs.submitted() if job_status.is_ours(found)]
        print(json.dumps(rows, indent=1) if as_json else "\n".join(job_status.table(rows)))
        return
    found = job_status.require(jobs, job)
    facts, record = job_status.facts(found, now=now), job_status.last_record(found)
    if as_json:
        print(json.dumps({**facts, **(record or {"metrics": None, "events": None})}, indent=1))
    else:
        print("\n".join(job_status.report(facts, record)))


def logs(
    job: JobId,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run ends; its exit code is this one's.")
    ] = False,
    address: Address = None,
    allow_clear_text_token: AllowClearText = False,
) -> None:
    """Print what a submitted run has printed."""
    from distft.cluster import job_status
    from distft.cluster.submit import follow_to_the_end

    jobs = _jobs(address, allow_clear_text_token)
    job_status.require(jobs, job)
    if follow:
        raise typer.Exit(follow_to_the_end(jobs, job))
    sys.stdout.write(jobs.log(job))


def _jobs(address: str | None, allow_clear_text: bool) -> "Jobs":
    from distft.cluster.dashboard_address import check_clear_text, choose_address
    from distft.cluster.jobs import Jobs

    url = choose_address(address, os.environ)
    if not allow_clear_text:
        check_clear_text(url, os.environ)
    return Jobs(url, os.environ, patience_s=_PATIENCE_S)
