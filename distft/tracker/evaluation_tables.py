"""What an evaluation found, as tables and pictures that services show."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CELL_PIXELS = 16
_INK = np.array([43, 108, 176])  # of a cell that has all rows of its label


@dataclass(frozen=True, slots=True)
class EvaluationTable:
    """Rows of one kind that an evaluation found."""

    name: str  # samples, or mistakes; in a mixture with the stream before it
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]

    def markdown(self) -> str:
        """As text; no cell can begin another one."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def tables_of(record: Mapping[str, Any]) -> Iterator[EvaluationTable]:
    """Those that are not empty, of a record as `Tracker.show` gets it."""
    samples = [(sample["prompt"], sample["text"]) for sample in record.get("samples", ())]
    if samples:
        yield EvaluationTable("samples", ("prompt", "text"), samples)
    columns = ("row", "label", "predicted", "probability", "text")
    for found in record.get("classifiers", ()):
        rows = [tuple(mistake[name] for name in columns) for mistake in found["mistakes"]]
        if rows:
            yield EvaluationTable(_named(found, "mistakes"), columns, rows)


def pictures_of(record: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Name and pixels [H, W, 3] of each confusion matrix; none without pillow, which services need."""
    if find_spec("PIL") is None:
        return
    for found in record.get("classifiers", ()):
        if "confusion" in found:
            counts = np.array(found["confusion"], np.float64)
            shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
            pixels = 255 - shares[:, :, None] * (255 - _INK)
            large = pixels.repeat(_CELL_PIXELS, axis=0).repeat(_CELL_PIXELS, axis=1)
            yield _named(found, "confusion"), large.round().astype(np.uint8)


def _named(found: Mapping[str, Any], kind: str) -> str:
    return f"{found['stream']}/{kind}" if found["stream"] else kind


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
