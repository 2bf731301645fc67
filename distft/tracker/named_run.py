"""Settings that all services have, and what makes several starts one run there."""

import secrets
from pathlib import Path

from pydantic import Field

from distft.config import Settings


class NamedRun(Settings):
    """How a run is called in a service."""

    project: str = "distft"
    name: str | None = Field(None, max_length=200)  # displayed name of the run; null: its run_id
    group: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = Field(None, max_length=10_000)


def stored_id(path: Path, new_id: str | None = None) -> str:
    """The id of the run in a service, from `path`; it is written there first if the file is not."""
    if path.exists() and (stored := path.read_text(encoding="utf-8").strip()):
        return stored
    path.parent.mkdir(parents=True, exist_ok=True)
    run_id = secrets.token_hex(4) if new_id is None else new_id
    path.write_text(f"{run_id}\n", encoding="utf-8")
    return run_id
