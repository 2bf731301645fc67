"""A classifier's confusion matrix and figures by class, as lines of text."""

import math
from collections.abc import Iterator, Sequence

_MOST_CLASSES = 30  # of the matrix, which a terminal is wide enough for
_MOST_CHARACTERS = 16  # of a label in a table
_Z = 1.959964  # of a two-sided interval of 95 %


def report_lines(
    by_class: Sequence[Sequence[int]], confusion: Sequence[Sequence[int]] | None, names: Sequence[str]
) -> list[str]:
    """`by_class`: how often each class is right, a label, and predicted.

    `confusion[i][j]` rows of label i were predicted to be label j.
    """
    num_correct, num_rows = sum(by_class[0]), sum(by_class[1])
    low, high = wilson_interval(num_correct, num_rows)
    lines = [
        f"{num_correct:,} of {num_rows:,} rows are right; 95 % interval of the accuracy (Wilson): "
        f"{low:.4f} to {high:.4f}",
        "",
        *_by_class(by_class, names),
    ]
    if confusion is None or len(names) > _MOST_CLASSES:
        return lines
    return [*lines, "", *_matrix(confusion, names)]


def wilson_interval(num_correct: int, num_rows: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which holds for few rows and shares near 0 and 1, too."""
    if not num_rows:
        return 0.0, 1.0
    share, squared = num_correct / num_rows, _Z**2 / num_rows
    middle = (share + squared / 2) / (1 + squared)
    half = _Z / (1 + squared) * math.sqrt(share * (1 - share) / num_rows + squared / (4 * num_rows))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _by_class(by_class: Sequence[Sequence[int]], names: Sequence[str]) -> Iterator[str]:
    shown = [_shortened(name) for name in names]
    width = max(map(len, [*shown, "label"]))
    yield f"{'label':<{width}}  {'precision':>9}  {'recall':>6}  {'f1':>6}  {'rows':>7}"
    for name, correct, labelled, predicted in zip(shown, *by_class, strict=True):
        figures = [(correct, predicted), (correct, labelled), (2 * correct, labelled + predicted)]
        precision, recall, f1 = (f"{part / whole:.4f}" if whole else "-" for part, whole in figures)
        yield f"{name:<{width}}  {precision:>9}  {recall:>6}  {f1:>6}  {labelled:>7,}"


def _matrix(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> Iterator[str]:
    shown = [_shortened(name) for name in names]
    first = max(map(len, [*shown, "label"]))
    widths = [max(len(name), *(len(f"{row[i]:,}") for row in confusion)) for i, name in enumerate(shown)]
    yield f"{'':<{first}}  predicted"
    header = "  ".join(f"{name:>{width}}" for name, width in zip(shown, widths, strict=True))
    yield f"{'label':<{first}}  {header}"
    for name, row in zip(shown, confusion, strict=True):
        cells = "  ".join(f"{count:>{width},}" for count, width in zip(row, widths, strict=True))
        yield f"{name:<{first}}  {cells}"


def _shortened(name: str) -> str:
    return name if len(name) <= _MOST_CHARACTERS else f"{name[: _MOST_CHARACTERS - 1]}…"
