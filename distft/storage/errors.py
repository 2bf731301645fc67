"""Turns errors of disks and object stores into `StorageError`s that name the file and the remedy."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distft.errors import DistftError, StorageError, UnreachableError
from distft.storage.paths import AnyPath, local_path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def full_disk_as_storage_error(path: AnyPath, num_bytes: int | None = None) -> Iterator[None]:
    """Raise a `StorageError` about `path` if the block runs out of disk space; pass on other errors.

    `num_bytes` is the size of the write. Also use it around third-party code that writes files itself.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        wanted = "" if num_bytes is None else f" for {num_bytes:,} bytes"
        quota = " in the quota" if error.errno == errno.EDQUOT else ""
        raise StorageError(
            f"{path}: no space left{quota}{wanted}; {_free_space(path)}. Free some space there or choose "
            "another path, then start again: files committed before are unharmed."
        ) from error


def _free_space(path: AnyPath) -> str:
    local = local_path(path)
    if local is None:
        return "the free space is unknown"
    existing = next((p for p in (local, *local.absolute().parents) if p.exists()), Path("/"))
    return f"{shutil.disk_usage(existing).free:,} bytes are free"


@contextmanager
def errors_as_unreachable(url: str, action: str) -> Iterator[None]:
    """Raise an `UnreachableError` about `url` for any exception of a storage library in the block.

    Errors of distft pass unchanged. A `FileNotFoundError` is raised again with the URL as its file name.
    `action` is a gerund for the message, such as "reading".
    """
    try:
        yield
    except DistftError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
    except Exception as error:  # every library has its own exceptions, often without a common base class
        message = getattr(error, "strerror", None) or str(error)
        reason = f"{type(error).__name__}: {message}" if message else type(error).__name__
        raise UnreachableError(f"{url}: {action} failed: {reason.rstrip('.')}. {remedy(error)}") from error


def remedy(error: Exception) -> str:
    """What the user can do about an exception of a storage library."""
    if isinstance(error, PermissionError) or "credential" in f"{type(error).__name__} {error}".lower():
        return (
            "Check the credentials (for S3 AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and "
            "their permissions: list, read, write and delete."
        )
    return (
        "Check the network, the service and its endpoint (for S3 AWS_ENDPOINT_URL_S3), then start again: "
        "files committed before are unharmed."
    )


def bucket_missing(url: str) -> UnreachableError:
    """The error for a URL whose bucket does not exist."""
    return UnreachableError(f"{url}: no such bucket. Create it, or correct the URL.")


def s3_error_code(error: BaseException) -> str | None:
    """S3's error code, such as "NoSuchBucket", from the exception or one of its causes."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return str(response["Error"].get("Code"))
        cause = cause.__cause__
    return None
