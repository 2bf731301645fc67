"""A client of Ray Jobs over HTTP that repeats requests and reopens log streams when the connection fails."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from distft.cluster.client.address import ADDRESS_VARIABLES
from distft.cluster.client.retry import CLIENT_ERRORS, print_to_stderr, retry, short_reason
from distft.cluster.client.upload import check_upload
from distft.cluster.ray_internals import (
    connect_job_client,
    http_status,
    is_job_id_taken,
    session_name,
)
from distft.config import redact
from distft.errors import ConfigError, LaunchError

T = TypeVar("T")

_REQUEST_TIMEOUT_S = 120.0
_MIN_PAUSE_S = 1.0  # before a log stream is opened again
_MAX_PAUSE_S = 30.0
_SILENCE_S = 30.0  # of a log stream, after which it is opened again: the connection may be dead
_MAX_SILENCE_S = 480.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A submitted job, as the cluster reports it. Times are in seconds since 1970."""

    job_id: str
    status: str  # PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    has_ended: bool
    exit_code: int | None  # of the driver; None if it did not end by itself; -N if signal N killed it
    started: float | None
    ended: float | None
    message: str
    entrypoint: str
    metadata: Mapping[str, str]
    runtime_env: Mapping[str, Any]


class JobClient:
    """The jobs of the cluster at `address`.

    Every method repeats its request for `retry_s` while the cluster does not answer or cannot serve it yet;
    then it raises `ClusterUnreachableError`.
    """

    def __init__(self, address: str, environ: MutableMapping[str, str], *, retry_s: float) -> None:
        # Ray's client prefers these variables to the address that it is given.
        for name in ADDRESS_VARIABLES:
            environ.pop(name, None)
        environ["RAY_ADDRESS"] = address
        self.address = redact(address)
        self._retry_s = retry_s
        try:
            self._client = self._retry(
                lambda: connect_job_client(address, request_timeout_s=_REQUEST_TIMEOUT_S)
            )
        except (ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(
                f"The server at {self.address} is not a Ray dashboard ({short_reason(error)}): "
                "give the dashboard's URL with --address."
            ) from None

    def session_name(self) -> str:
        """The name of the cluster's session; the head's disk has a directory of this name."""
        return self._retry(lambda: session_name(self._client))

    def submit(
        self, job_id: str, entrypoint: str, *, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """Upload the working directory and start a job. Raises `ConfigError` if the upload is too large."""

        def attempt() -> None:
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env=dict(runtime_env),
                    metadata=dict(metadata),
                )
            except RuntimeError as error:
                # Ids are unique: an earlier attempt succeeded, and its answer was lost.
                if not is_job_id_taken(error, job_id):
                    raise

        if working_dir := runtime_env.get("working_dir"):
            check_upload(Path(working_dir))
        try:
            self._retry(attempt)
        except ValueError as error:
            raise ConfigError(f"{working_dir} cannot be uploaded: {error}") from None
        except RuntimeError as error:
            raise LaunchError(f"The cluster refused the job: {error}") from None

    def find(self, job_id: str) -> Job | None:
        """The job with that id; None if the cluster does not know it."""

        def attempt() -> Job | None:
            try:
                return _job(self._client.get_job_info(job_id))
            except RuntimeError as error:
                if http_status(error) == 404:
                    return None
                raise

        return self._retry(attempt)

    def get(self, job_id: str) -> Job:
        """As `find`, but raises `LaunchError` if the cluster does not know the job any more."""
        job = self.find(job_id)
        if job is None:
            raise LaunchError(
                f"The cluster at {self.address} no longer knows {job_id}, because its head was restarted. "
                "Submit the run again: it resumes from its last checkpoint."
            )
        return job

    def submitted(self) -> list[Job]:
        """All submitted jobs, newest first."""
        found = [details for details in self._retry(self._client.list_jobs) if details.submission_id]
        return sorted(map(_job, found), key=lambda job: job.started or 0.0, reverse=True)

    def log(self, job_id: str) -> str:
        """The job's output so far."""
        return str(self._retry(lambda: self._client.get_job_logs(job_id)))

    def stop(self, job_id: str, *, grace_s: float) -> Job:
        """Ask the job to end, and wait for it: `grace_s`, and as long again for Ray to kill it."""
        self._retry(lambda: self._client.stop_job(job_id))
        deadline = time.monotonic() + 2 * grace_s
        while not (job := self.get(job_id)).has_ended:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{job_id} was asked to stop, but is still {job.status} after {2 * grace_s:g} s."
                )
            time.sleep(0.5)
        return job

    def follow(self, job_id: str, show: Callable[[str], None], *, silence_s: float = _SILENCE_S) -> Job:
        """Pass the job's whole output to `show`, once and in order, until the job ends; returns the job then.

        Opens the log stream again if it breaks off, or is silent for `silence_s` or longer.
        """
        printer = _LogPrinter(show)
        pause_s, max_silence_s, is_reported = 0.0, silence_s, False
        while not (job := self.get(job_id)).has_ended:
            time.sleep(pause_s)
            before = printer.num_chars
            try:
                asyncio.run(self._stream(job_id, printer, max_silence_s))
            except TimeoutError:
                max_silence_s = min(2 * max_silence_s, _MAX_SILENCE_S)
            except CLIENT_ERRORS as error:
                if not is_reported:
                    print_to_stderr(f"The log stream broke off ({short_reason(error)}): connecting again.")
                is_reported = True
                with contextlib.suppress(*CLIENT_ERRORS):  # for networks that block streams
                    printer.show_rest(str(self._client.get_job_logs(job_id)))
            pause_s = min(max(2 * pause_s, _MIN_PAUSE_S), _MAX_PAUSE_S)
            if printer.num_chars > before:
                pause_s, max_silence_s = _MIN_PAUSE_S, silence_s
        try:
            printer.show_rest(self.log(job_id))
        except (LaunchError, RuntimeError) as error:
            print_to_stderr(f"The rest of the log of {job_id} cannot be read: {error}")
        return job

    async def _stream(self, job_id: str, printer: "_LogPrinter", max_silence_s: float) -> None:
        """Print the log until the server ends the stream. Raises `TimeoutError` after `max_silence_s`."""
        stream, num_read = self._client.tail_job_logs(job_id), 0
        try:
            while True:
                text = await asyncio.wait_for(anext(stream), max_silence_s)
                num_read += len(text)
                printer.show(text, ends_at=num_read)
        except StopAsyncIteration:
            return
        finally:
            await stream.aclose()

    def _retry(self, call: Callable[[], T]) -> T:
        return retry(call, address=self.address, timeout_s=self._retry_s)


class _LogPrinter:
    """Prints a log that arrives several times from its beginning, each character once."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.num_chars = 0  # shown so far

    def show(self, text: str, *, ends_at: int) -> None:
        """Show the new characters of `text`, which ends after the log's first `ends_at` characters."""
        num_new = ends_at - self.num_chars
        if num_new > 0:
            self.num_chars = ends_at
            self._show(text[-num_new:])

    def show_rest(self, log: str) -> None:
        """Show the new characters of a whole log."""
        self.show(log, ends_at=len(log))


def _job(details: Any) -> Job:
    """Ray's `JobDetails` as a `Job`."""
    return Job(
        job_id=details.submission_id,
        status=str(details.status),
        has_ended=details.status.is_terminal(),
        exit_code=details.driver_exit_code,
        started=None if details.start_time is None else details.start_time / 1000,
        ended=None if details.end_time is None else details.end_time / 1000,
        message=details.message or "",
        entrypoint=details.entrypoint,
        metadata=details.metadata or {},
        runtime_env=details.runtime_env or {},
    )
