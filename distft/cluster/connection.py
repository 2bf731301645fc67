"""Connects a driver to the Ray cluster at RAY_ADDRESS, or starts a Ray on this machine for it."""

import contextlib
import os
from collections.abc import Iterator, Mapping, MutableMapping

import ray

from distft.cluster.ray_internals import set_ray_environment, socket_path_limit
from distft.cluster.tokens import ensure_token
from distft.config import redact
from distft.errors import ConfigError, DistftError, LaunchError

# Only a configuration and some text pass through the object store; Ray's minimum is 75 MB.
_OBJECT_STORE_BYTES = 100_000_000


@contextlib.contextmanager
def ray_connection(
    environ: MutableMapping[str, str],
    *,
    num_cpus: int,
    start_attempt_s: float,
    health_check_timeout_s: float,
    what: str = "run",
) -> Iterator[None]:
    """Connect to the cluster, or start a local one; disconnect or stop it when the block ends.

    A local one has at least `num_cpus`, more than the machine's too. The times are those of
    `set_ray_environment`.
    """
    address = environ.get("RAY_ADDRESS")
    if address and "://" in address and not address.startswith("ray://"):
        raise LaunchError(
            f"RAY_ADDRESS={address} is the URL of a dashboard, which is for `distft submit`. A driver needs "
            "the address of the cluster itself, such as head:6379, or auto on one of its nodes."
        )
    print(
        f"Connecting to Ray at {address}." if address else f"Starting a local Ray for this {what}.",
        flush=True,
    )
    set_ray_environment(
        environ, start_attempt_s=start_attempt_s, health_check_timeout_s=health_check_timeout_s
    )
    if not address:
        ensure_token(environ)
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            # "local" starts a new cluster even if one runs on this machine, which the user did not name.
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, num_cpus),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
    except (OSError, ValueError, RuntimeError) as error:
        ray.shutdown()  # of what has started
        raise _connection_error(error, address, environ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _connection_error(error: Exception, address: str | None, environ: Mapping[str, str]) -> DistftError:
    """The `DistftError` for an error of `ray.init`."""
    if (limit := socket_path_limit(error)) is not None:
        name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if environ.get(name)), "TMPDIR")
        return ConfigError(
            f"{name}={environ.get(name, '')} is too long for Ray's sockets, whose paths may have {limit} "
            "bytes: set RAY_TMPDIR to a short directory of your own."
        )
    problem = f"connect to the cluster at RAY_ADDRESS={redact(address)}" if address else "start Ray here"
    return LaunchError(f"Could not {problem}: {redact(str(error))}")
