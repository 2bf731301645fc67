"""How far an unfinished tokenization has come: one small file, replaced after every part."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distft.data.shard_writer import WriterState
from distft.errors import DataError

_NAME = "unfinished.json"
_VERSION = 1


@dataclass(kw_only=True)
class Record:
    """What is on disk, and of which work."""

    identity: dict[str, Any]
    num_parts: int = 0
    source_bytes: int = 0
    writers: dict[str, WriterState] = field(default_factory=dict)


def load_record(output: Path) -> Record | None:
    """The record in `output`, None where there is none. Raises `DataError` where it cannot be read."""
    try:
        stored = json.loads((output / _NAME).read_text(encoding="utf-8"))
        if stored.pop("version") != _VERSION:
            raise ValueError("it is of another version of distft")
        writers = {side: WriterState(**state) for side, state in stored.pop("writers").items()}
        return Record(**stored, writers=writers)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{output / _NAME} cannot be read ({error}): overwrite {output} to start again."
        ) from error


def save_record(output: Path, record: Record | None) -> None:
    """Replace the record, whole or not at all; None removes it. Raises `DataError` on a full disk."""
    path = output / _NAME
    if record is None:
        path.unlink(missing_ok=True)
        return
    draft = path.with_name(f"{_NAME}.tmp")
    try:
        draft.write_text(json.dumps({"version": _VERSION, **asdict(record)}), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}. What was recorded before is unharmed: make "
            "room and run the same command again, and it goes on from there."
        ) from error
