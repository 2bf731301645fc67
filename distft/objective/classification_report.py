"""A classifier's confusion matrix and figures by class, as lines of text."""

from collections.abc import Iterator, Sequence

from distft.objective.intervals import macro_f1_interval, share_line, wilson_interval

_MOST_CLASSES = 30  # of the matrix, which a terminal is wide enough for
_MOST_CHARACTERS = 16  # of a label in a table


def report_lines(
    by_class: Sequence[Sequence[int]], confusion: Sequence[Sequence[int]] | None, names: Sequence[str]
) -> list[str]:
    """`by_class`: how often each class is right, a label, and predicted.

    `confusion[i][j]` rows of label i were predicted to be label j.
    """
    lines = [share_line(sum(by_class[0]), sum(by_class[1]), "rows", "accuracy")]
    if confusion is not None:
        low, high = macro_f1_interval(confusion)
        lines.append(f"95 % interval of macro_f1 (resampled rows): {low:.4f} to {high:.4f}")
    lines += ["", *class_table(by_class, names)]
    if confusion is None or len(names) > _MOST_CLASSES:
        return lines
    return [*lines, "", *_matrix(confusion, names)]


def class_table(by_class: Sequence[Sequence[int]], names: Sequence[str], unit: str = "rows") -> Iterator[str]:
    """Precision, recall and F1 by class, the former with Wilson's intervals; `by_class` as above.

    `unit` is what is counted.
    """
    shown = [_shortened(name) for name in names]
    width = max(map(len, [*shown, "label"]))
    between = f"{'95 % interval':>16}"
    yield f"{'label':<{width}}  {'precision':>9}  {between}  {'recall':>6}  {between}  {'f1':>6}  {unit:>8}"
    for name, correct, labelled, predicted in zip(shown, *by_class, strict=True):
        precision, recall = _share(correct, predicted, 9), _share(correct, labelled, 6)
        both = labelled + predicted
        f1 = f"{2 * correct / both:.4f}" if both else "-"
        yield f"{name:<{width}}  {precision}  {recall}  {f1:>6}  {labelled:>8,}"


def _share(part: int, whole: int, width: int) -> str:
    """With its interval; neither is defined of nothing."""
    if not whole:
        return f"{'-':>{width}}  {'-':>16}"
    low, high = wilson_interval(part, whole)
    return f"{part / whole:>{width}.4f}  {low:.4f} to {high:.4f}"


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
