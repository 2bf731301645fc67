"""The jobs of a Ray cluster, over HTTP, by a client that puts up with networks and heads that come and go."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.job_submission import JobSubmissionClient

from distft.cluster.dashboard_address import ADDRESS_VARIABLES
from distft.cluster.patience import FAULTS, patiently, reason, status_code, tell
from distft.config import redact
from distft.errors import ConfigError, LaunchError

T = TypeVar("T")

_REQUEST_S = 120.0  # for one answer; Ray's client would wait for ever
_PAUSE_S = 1.0  # before another attempt
_LONGEST_PAUSE_S = 30.0
_SILENCE_S = 30.0  # of a log; then it is asked whether the stream still stands
_LONGEST_SILENCE_S = 480.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a cluster knows of a submitted job. Times are in seconds since 1970."""

    job_id: str
    state: str  # PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    is_over: bool
    exit_code: int | None  # of the driver, once it has ended by itself
    started: float | None
    ended: float | None
    message: str
    entrypoint: str
    metadata: Mapping[str, str]
    runtime_env: Mapping[str, Any]


class Jobs:
    """The jobs of the cluster at `address`.

    Every method asks again for `patience_s` where the cluster does not answer, or answers that it cannot
    yet; then it raises `NoAnswerError`.
    """

    def __init__(self, address: str, environ: MutableMapping[str, str], *, patience_s: float) -> None:
        # Ray's client prefers its variables to the address that it is given.
        for name in ADDRESS_VARIABLES:
            environ.pop(name, None)
        environ["RAY_ADDRESS"] = address
        _quieten_ray()
        self.address = redact(address)
        self._patience_s = patience_s
        try:
            self._client = self._patiently(lambda: _Client(address))
        except (ValueError, KeyError, RuntimeError) as error:
            raise ConfigError(
                f"What answers at {self.address} is not a Ray dashboard ({reason(error)}): "
                "give the dashboard's URL with --address."
            ) from None

    def session_name(self) -> str:
        """Of the cluster's life since its head started; also its directory on the head's disk."""
        return self._patiently(self._client.session_name)

    def submit(
        self, job_id: str, entrypoint: str, *, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]
    ) -> None:
        """Upload what has to be, and start a job. Raises `ConfigError` where the upload is too large."""

        def attempt() -> None:
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env=dict(runtime_env),
                    metadata=dict(metadata),
                )
            except RuntimeError as error:
                # An earlier attempt got there, and its answer did not get back: ids are never used twice.
                if f"{job_id} already exists" not in str(error):
                    raise

        try:
            self._patiently(attempt)
        except ValueError as error:
            raise ConfigError(
                f"{runtime_env.get('working_dir')} cannot be uploaded: {error} What a run does not need may "
                "stand in .gitignore."
            ) from None
        except RuntimeError as error:
            raise LaunchError(f"The cluster did not take the job: {error}") from None

    def find(self, job_id: str) -> Job | None:
        """The job of that id; None where the cluster knows of none."""

        def attempt() -> Job | None:
            try:
                return _job(self._client.get_job_info(job_id))
            except RuntimeError as error:
                if status_code(error) == 404:
                    return None
                raise

        return self._patiently(attempt)

    def get(self, job_id: str) -> Job:
        """As `find`; raises `LaunchError` where the cluster has forgotten the job."""
        job = self.find(job_id)
        if job is None:
            raise LaunchError(
                f"The cluster at {self.address} no longer knows {job_id}: its head started again. Submitted "
                "again, the run goes on from its last commit."
            )
        return job

    def submitted(self) -> list[Job]:
        """Every job that was submitted, newest first."""
        found = [details for details in self._patiently(self._client.list_jobs) if details.submission_id]
        return sorted(map(_job, found), key=lambda job: job.started or 0.0, reverse=True)

    def log(self, job_id: str) -> str:
        """What the job has printed so far."""
        return str(self._patiently(lambda: self._client.get_job_logs(job_id)))

    def stop(self, job_id: str, *, grace_s: float) -> Job:
        """Ask the job to end, and wait until it has: `grace_s`, and as long again for Ray to kill it."""
        self._patiently(lambda: self._client.stop_job(job_id))
        deadline = time.monotonic() + 2 * grace_s
        while not (job := self.get(job_id)).is_over:
            if time.monotonic() > deadline:
                raise LaunchError(f"{job_id} was asked to stop, but is still {job.state} after a while.")
            time.sleep(0.5)
        return job

    def follow(self, job_id: str, show: Callable[[str], None], *, silence_s: float = _SILENCE_S) -> Job:
        """`show` everything that the job prints, once and in order, until it is over; returns its end.

        A stream that breaks off, or is silent for so long that it may be dead, is opened again.
        """
        shown = _Shown(show)
        pause_s, quiet_s, is_told = 0.0, silence_s, False
        while not (job := self.get(job_id)).is_over:
            time.sleep(pause_s)
            before = shown.num_chars
            try:
                asyncio.run(self._stream(job_id, shown, quiet_s))
            except TimeoutError:
                quiet_s = min(2 * quiet_s, _LONGEST_SILENCE_S)
            except FAULTS as error:
                if not is_told:
                    tell(f"The stream of the log broke off ({reason(error)}): connecting again.")
                is_told = True
                with contextlib.suppress(*FAULTS):  # for networks that let no stream through
                    shown.show_beyond(str(self._client.get_job_logs(job_id)))
            pause_s = min(max(2 * pause_s, _PAUSE_S), _LONGEST_PAUSE_S)
            if shown.num_chars > before:
                pause_s, quiet_s = _PAUSE_S, silence_s
        try:
            shown.show_beyond(self.log(job_id))
        except (LaunchError, RuntimeError) as error:
            tell(f"The rest of the log of {job_id} is not to be had: {error}")
        return job

    async def _stream(self, job_id: str, shown: "_Shown", silence_s: float) -> None:
        """Until the other side ends the stream. Raises `TimeoutError` after that long a silence."""
        stream, read = self._client.tail_job_logs(job_id), 0
        try:
            while True:
                text = await asyncio.wait_for(anext(stream), silence_s)
                read += len(text)
                shown.show(text, ends_at=read)
        except StopAsyncIteration:
            return
        finally:
            await stream.aclose()

    def _patiently(self, call: Callable[[], T]) -> T:
        return patiently(call, address=self.address, patience_s=self._patience_s)


class _Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types
    """Ray's client, none of whose requests can hang."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, timeout=_REQUEST_S, **options)

    def session_name(self) -> str:
        return str(self._do_request("GET", "/api/version").json().get("session_name", ""))


class _Shown:
    """How much of a log was shown, in characters from its beginning."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self.num_chars = 0

    def show(self, text: str, *, ends_at: int) -> None:
        """Show what is new of `text`, whose last character is the log's `ends_at`th."""
        num_new = ends_at - self.num_chars
        if num_new > 0:
            self.num_chars = ends_at
            self._show(text[-num_new:])

    def show_beyond(self, log: str) -> None:
        """Show what is new of a whole log."""
        self.show(log, ends_at=len(log))


def _job(details: Any) -> Job:
    return Job(
        job_id=details.submission_id,
        state=str(details.status),
        is_over=details.status.is_terminal(),
        exit_code=details.driver_exit_code,
        started=None if details.start_time is None else details.start_time / 1000,
        ended=None if details.end_time is None else details.end_time / 1000,
        message=details.message or "",
        entrypoint=details.entrypoint,
        metadata=details.metadata or {},
        runtime_env=details.runtime_env or {},
    )


def _quieten_ray() -> None:
    """Ray's client tells every step at level INFO; only who asks for that level is to hear of it."""
    if not logging.getLogger().isEnabledFor(logging.INFO):
        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk"):
            logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)
        logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
