"""Turns errors of disks and object stores into `StorageError`s that name the file and the remedy."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from distft.errors import DistftError, StorageError, UnreachableError
from distft.storage.paths import AnyPath, local_path

T = TypeVar("T")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# Of network file systems and disks; they say nothing about the file, and often pass.
_PASSING = frozenset(
    {
        errno.EIO,
        errno.ESTALE,  # NFS: the server forgot the file handle; opening the path anew helps
        errno.EAGAIN,
        errno.EBUSY,
        errno.ETIMEDOUT,
        errno.EREMOTEIO,
        errno.ECOMM,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOTCONN,  # FUSE: its process is gone
        errno.ESHUTDOWN,
    }
)
_NO_SUCH_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
RETRY_WAITS_S = (0.1, 0.5, 2.0)  # before the second, third and last attempt


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


def retried(path: AnyPath, action: str, attempt: Callable[[], T]) -> T:
    """The result of `attempt`, which reads a local file and is repeated after an error that may pass.

    Raises `UnreachableError` if it does not pass within seconds, and any other error at once. `action` is a
    gerund for the message. Stores have retries of their own, in their libraries.
    """
    for wait_s in (*RETRY_WAITS_S, None):
        try:
            return attempt()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            if wait_s is None:
                raise _unreachable(path, action, error) from error
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


@contextmanager
def unreadable_as_unreachable(path: AnyPath) -> Iterator[None]:
    """Raise an `UnreachableError` for an `OSError` in the block, unless it says that no file is there.

    Use it where a `StorageError` would count as damage: a file without read permission is not damaged.
    """
    try:
        yield
    except _NO_SUCH_FILE:
        raise
    except OSError as error:
        raise _unreachable(path, "reading", error) from error


def _unreachable(path: AnyPath, action: str, error: OSError) -> UnreachableError:
    remedy = (
        "Give this user the right to read it"
        if isinstance(error, PermissionError)
        else "Check the disk, its mount and the network"
    )
    return UnreachableError(
        f"{path}: {action} failed: {error.strerror or error}. {remedy}, then start again: "
        "nothing was changed."
    )


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
