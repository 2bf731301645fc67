"""Refuses a directory that is too large to be uploaded, before it is packed and sent."""

from pathlib import Path

from distft.cluster.paths import RUN_ROOT
from distft.cluster.ray_internals import files_to_upload
from distft.errors import ConfigError

MAX_BYTES = 100 << 20  # of a request to Ray's dashboard
_NUM_SHOWN = 5


def check_upload(directory: Path) -> None:
    """Raise `ConfigError` if Ray would refuse `directory`, with its largest files and what helps."""
    sizes = {path: path.stat().st_size for path in files_to_upload(directory)}  # Ray does not compress
    num_bytes = sum(sizes.values())
    if num_bytes < MAX_BYTES:
        return
    largest = sorted(sizes, key=lambda path: -sizes[path])[:_NUM_SHOWN]
    rest = num_bytes - sum(sizes[path] for path in largest)
    shown = "".join(f"\n{_mib(sizes[path]):>12}  {path.relative_to(directory)}" for path in largest)
    raise ConfigError(
        f"{directory} is too large to be uploaded: it has {_mib(num_bytes)}, and Ray takes less than "
        f"{_mib(MAX_BYTES)}. Name what the run does not need in .gitignore, and it stays here: without the "
        f"{len(largest)} largest files, {_mib(rest)} are left. Or share the directory between the nodes, and "
        f"name it with {RUN_ROOT}.{shown}"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"
