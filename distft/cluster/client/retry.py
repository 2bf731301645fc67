"""Repeats requests to a cluster that may succeed later: no connection, or a head that has just started."""

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import aiohttp
from ray.exceptions import AuthenticationError

from distft.cluster.ray_internals import http_status, is_job_agent_missing
from distft.config import redact
from distft.errors import ConfigError, LaunchError

T = TypeVar("T")

# All errors that Ray's client raises, permanent ones too.
CLIENT_ERRORS = (OSError, RuntimeError, aiohttp.ClientError)

_PAUSE_S = 1.0
_MAX_REASON_CHARS = 200


class ClusterUnreachableError(LaunchError):
    """The cluster does not answer, or cannot serve the request. The status of its jobs is unknown."""


def retry(call: Callable[[], T], *, address: str, timeout_s: float) -> T:
    """Return what `call` returns; repeat it for up to `timeout_s` after transient errors.

    Reports the first of them on stderr. Raises `ClusterUnreachableError` after `timeout_s`, `ConfigError` for
    a missing or wrong token, and any error that is not transient unchanged.
    """
    deadline, is_reported = time.monotonic() + timeout_s, False
    while True:
        try:
            return call()
        except AuthenticationError as error:
            raise ConfigError(
                f"The cluster at {address} requires its token ({short_reason(error)}): set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with the token."
            ) from None
        except CLIENT_ERRORS as error:
            if not _is_transient(error):
                raise
            if time.monotonic() > deadline:
                raise ClusterUnreachableError(
                    f"No Ray dashboard answers at {address} ({short_reason(error)}). {_remedy(error)}"
                ) from None
            if not is_reported:
                print_to_stderr(f"{address}: {short_reason(error)}; trying again for {timeout_s:g} s.")
            is_reported = True
        time.sleep(min(_PAUSE_S, timeout_s))


def short_reason(error: BaseException) -> str:
    """The innermost cause of `error` in one line: libraries wrap `Connection refused` three times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = str(error).strip().splitlines() or [""]
    # A server may answer with a traceback, which ends with the error.
    reason = getattr(error, "strerror", None) or lines[-1 if "Traceback" in lines[0] else 0].strip()
    return redact(reason[:_MAX_REASON_CHARS].rstrip(".")) or type(error).__name__


def print_to_stderr(text: str) -> None:
    """Print a message to stderr; stdout is for a run's log only."""
    print(text, file=sys.stderr, flush=True)


def _is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: there was no connection, or the server failed."""
    if isinstance(error, RuntimeError):
        return (http_status(error) or 0) >= 500
    return not isinstance(error, ValueError)  # requests raises an OSError that is a ValueError for bad JSON


def _remedy(error: BaseException) -> str:
    if is_job_agent_missing(error):
        return (
            "A node's job agent starts some seconds after the node, and not at all if its port is taken by "
            "another cluster on the same machine: `ray start --dashboard-agent-listen-port 0` chooses a free "
            "one."
        )
    return "Is the cluster up (`ray start --head`), and is this its dashboard's URL (--address)?"
