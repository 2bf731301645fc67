"""The progress of an unfinished tokenization on disk: one small file, replaced after every chunk."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distft.data.shard_writer import WriterProgress
from distft.errors import DataError

_NAME = "unfinished.json"
_VERSION = 1


@dataclass(kw_only=True)
class SavedProgress:
    """The work that an output directory contains, and how much of it is written."""

    output_spec: dict[str, Any]  # everything that determines the bytes of the shards
    num_chunks: int = 0
    source_bytes: int = 0
    writers: dict[str, WriterProgress] = field(default_factory=dict)  # by split


def load_progress(output: Path) -> SavedProgress | None:
    """Read the progress in `output`; None if there is none. Raises `DataError` if it cannot be read."""
    try:
        stored = json.loads((output / _NAME).read_text(encoding="utf-8"))
        if stored["version"] != _VERSION:
            raise ValueError("it is of another version of distft")
        return SavedProgress(
            output_spec=stored["identity"],
            num_chunks=stored["num_parts"],
            source_bytes=stored["source_bytes"],
            writers={split: WriterProgress(**writer) for split, writer in stored["writers"].items()},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{output / _NAME} cannot be read ({error}): overwrite {output} to start again."
        ) from error


def save_progress(output: Path, progress: SavedProgress) -> None:
    """Replace the file atomically. Raises `DataError` on a full disk."""
    path = output / _NAME
    temporary = path.with_name(f"{_NAME}.tmp")
    stored = {
        "version": _VERSION,
        "identity": progress.output_spec,
        "num_parts": progress.num_chunks,
        "source_bytes": progress.source_bytes,
        "writers": {split: asdict(writer) for split, writer in progress.writers.items()},
    }
    try:
        temporary.write_text(json.dumps(stored), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}. Work recorded so far is intact: free disk "
            "space and run the same command again to resume."
        ) from error


def remove_progress(output: Path) -> None:
    (output / _NAME).unlink(missing_ok=True)
