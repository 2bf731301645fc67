"""Names of the classes that integers stand for, in a Parquet file's metadata, as Hugging Face writes them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distft.data.rows import text_problem

_KEY = b"huggingface"
_MOST_BYTES = 16 * 1024 * 1024  # of the metadata
_MOST_NAMES = 1 << 16  # as many as there are, and more, in any data set of images


@dataclass(frozen=True, slots=True)
class NamedClasses:
    """The names of classes by column, and what of the metadata is not used, for the log."""

    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def label(self, column: str, value: object) -> object:
        """The name of a class, for a whole number in a column that has names; another value as it is.

        Raises `ValueError`, with what is wrong, for a number that has no name.
        """
        names = self.names.get(column)
        if names is None or isinstance(value, bool) or not isinstance(value, int):
            return value
        if not 0 <= value < len(names):
            unlabelled = " (-1: Hugging Face's unlabelled rows)" if value == -1 else ""
            raise ValueError(
                f"is {value}{unlabelled}, and the file's metadata names the classes 0 to {len(names) - 1}: "
                "label the row, remove it, or set label=null for all."
            )
        return names[value]


def named_classes(metadata: Mapping[bytes, bytes] | None, columns: Sequence[str]) -> NamedClasses:
    """The names that the metadata of a schema gives these columns. What is malformed is noted, not used."""
    text = None if metadata is None else metadata.get(_KEY)
    if text is None:
        return NamedClasses()
    if len(text) > _MOST_BYTES:
        return NamedClasses(notes=(f"metadata of {len(text):,} bytes is not read for names of classes",))
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return NamedClasses(notes=("the metadata is no JSON: it is not read for names of classes",))
    names, notes = {}, []
    for column in columns:
        own = _names_of(found, column)
        if own is None:
            continue
        if problem := _problem(own):
            notes.append(f"the names of classes of {column!r} in the metadata are not used: {problem}")
        else:
            names[column] = own
    return NamedClasses(names, tuple(notes))


def _names_of(metadata: Any, column: str) -> Any:
    """The names of a column of classes; None: it is none."""
    for key in ("info", "features", column):
        metadata = metadata.get(key) if isinstance(metadata, dict) else None
    return (
        metadata.get("names")
        if isinstance(metadata, dict) and metadata.get("_type") == "ClassLabel"
        else None
    )


def _problem(names: Any) -> str | None:
    if not isinstance(names, list) or not names:
        return "they are no list of names"
    if len(names) > _MOST_NAMES:
        return f"they are {len(names):,}, and at most {_MOST_NAMES:,} are read"
    if any(text_problem(name) or not name.strip() for name in names):
        return "one of them is no text, or empty"
    if len(set(names)) < len(names):
        return "two of them are equal"
    return None
