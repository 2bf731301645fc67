"""Spans of words in labels of the kinds IOB1, IOB2 and IOBES, and their counts for precision, recall and F1.

The rules are those of conlleval and seqeval: a span begins with B or S, or where another type begins or the
last word was outside; it ends with E or S, or before the next span.
"""

from collections.abc import Sequence
from typing import NamedTuple

_OUTSIDE = "O"
_PREFIXES = {"B", "I", "E", "S"}


class Span(NamedTuple):
    """Words [start, stop) that make one entity."""

    type: str
    start: int
    stop: int


def entity_types(names: Sequence[str]) -> list[str]:
    """The types of entities that these labels mark; none if some label is neither `O` nor like `B-PER`."""
    types = set()
    for name in names:
        prefix, dash, kind = name.partition("-")
        if name == _OUTSIDE:
            continue
        if prefix not in _PREFIXES or not dash or not kind:
            return []
        types.add(kind)
    return sorted(types)


def spans_of(labels: Sequence[str]) -> list[Span]:
    """The entities of one sentence, in order."""
    spans: list[Span] = []
    before, kind_before, start = _OUTSIDE, "", 0
    for place, label in enumerate([*labels, _OUTSIDE]):
        prefix, _, kind = label.partition("-")
        is_inside = before != _OUTSIDE
        is_new = prefix in {"B", "S"} or before in {"E", "S"} or kind != kind_before or prefix == _OUTSIDE
        if is_inside and is_new:
            spans.append(Span(kind_before, start, place))
        if prefix != _OUTSIDE and (is_new or not is_inside):
            start = place
        before, kind_before = prefix, kind
    return spans


def precision_recall_f1(
    num_right: float, num_predicted: float, num_real: float
) -> tuple[float, float, float]:
    """Each 0 where it is not defined."""
    precision = num_right / num_predicted if num_predicted else 0.0
    recall = num_right / num_real if num_real else 0.0
    total = num_predicted + num_real
    return precision, recall, 2 * num_right / total if total else 0.0
