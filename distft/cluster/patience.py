"""Asking a cluster again, where a fault may pass: no connection, a head that has just started."""

import re
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import aiohttp
from ray.exceptions import AuthenticationError

from distft.config import redact
from distft.errors import ConfigError, LaunchError

T = TypeVar("T")

FAULTS = (OSError, RuntimeError, aiohttp.ClientError)  # all that Ray's client raises; not all of them pass

_PAUSE_S = 1.0
_STATUS_CODE = re.compile(r"status code (\d{3})")
_LONGEST_REASON = 200  # characters


class NoAnswerError(LaunchError):
    """The cluster cannot be reached, or does not do what it is asked; what its jobs do is not known."""


def patiently(call: Callable[[], T], *, address: str, patience_s: float) -> T:
    """What `call` returns, asked again for `patience_s` and told so once on stderr; then `NoAnswerError`.

    What cannot pass is raised as it is, but for a token that is missing or wrong: that is a `ConfigError`.
    """
    deadline, is_told = time.monotonic() + patience_s, False
    while True:
        try:
            return call()
        except AuthenticationError as error:
            raise ConfigError(
                f"The cluster at {address} wants its token ({reason(error)}): set RAY_AUTH_MODE=token, "
                "and RAY_AUTH_TOKEN_PATH to the file that holds it."
            ) from None
        except FAULTS as error:
            if not _may_pass(error):
                raise
            if time.monotonic() > deadline:
                raise NoAnswerError(
                    f"No Ray dashboard serves at {address} ({reason(error)}). {_remedy(error)}"
                ) from None
            if not is_told:
                tell(f"{address}: {reason(error)}; asking again for {patience_s:g} s.")
            is_told = True
        time.sleep(min(_PAUSE_S, patience_s))


def status_code(error: BaseException) -> int | None:
    """Of the answer that Ray's client made an error of."""
    found = _STATUS_CODE.search(str(error))
    return None if found is None else int(found[1])


def reason(error: BaseException) -> str:
    """In a few words: libraries wrap `Connection refused` three times."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    lines = str(error).strip().splitlines() or [""]
    # What a server says of itself may be a traceback, with the fault at its end.
    said = getattr(error, "strerror", None) or lines[-1 if "Traceback" in lines[0] else 0].strip()
    return redact(said[:_LONGEST_REASON].rstrip(".")) or type(error).__name__


def tell(text: str) -> None:
    """Beside the log of a run, which has stdout to itself."""
    print(text, file=sys.stderr, flush=True)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later: no connection, or a fault on the other side."""
    if isinstance(error, RuntimeError):
        return (status_code(error) or 0) >= 500
    return not isinstance(error, ValueError)  # an answer that is no JSON, which requests makes an OSError


def _remedy(error: BaseException) -> str:
    if "No available agent" in str(error):
        return (
            "Agents start some seconds after their nodes; none does where its port is taken, by another "
            "cluster on the same machine: `ray start --dashboard-agent-listen-port 0` chooses a free one."
        )
    return "Is the cluster up (`ray start --head`), and is this its dashboard's URL (--address)?"
