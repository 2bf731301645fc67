"""What goes wrong with a store elsewhere, told so that the user can act."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from distft.errors import DistftError, UnreachableError


@contextmanager
def faults_explained(url: str, doing: str) -> Iterator[None]:
    """Turn what a store's library raises into an `UnreachableError`; ours pass.

    A `FileNotFoundError` stays one, and names the URL.
    """
    try:
        yield
    except DistftError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
    except Exception as error:  # each library has exceptions of its own, many of them of no common kind
        said = getattr(error, "strerror", None) or str(error)
        reason = f"{type(error).__name__}: {said}" if said else type(error).__name__
        raise UnreachableError(f"{url}: {doing} failed: {reason.rstrip('.')}. {remedy(error)}") from error


def remedy(error: Exception) -> str:
    """What the user can do about it."""
    if isinstance(error, PermissionError) or "credential" in f"{type(error).__name__} {error}".lower():
        return (
            "Check the credentials (for S3 AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and "
            "what they may do there: list, read, write and delete."
        )
    return (
        "Check the network, the service and its endpoint (for S3 AWS_ENDPOINT_URL_S3), then start again: "
        "what was committed before is unharmed."
    )


def bucket_missing(url: str) -> UnreachableError:
    """The fault of a URL in a bucket that does not exist."""
    return UnreachableError(f"{url}: there is no such bucket. Create it, or correct the URL.")


def error_code(error: BaseException) -> str | None:
    """What S3 calls the fault that the exception stands for."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code"))
        cause = cause.__cause__
    return None
