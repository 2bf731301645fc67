"""What a run's evaluations found besides metrics, as its file shows it: nothing in it is trusted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.report.recorded_run import RecordedRun
from distft.report.values import is_int, is_number

_MOST_LABELS = 60
_MOST_MISTAKES = 50
_MOST_CHARACTERS = 600
MOST_SAMPLES = 200  # of one prompt; of more, some between the first and the last are left out


@dataclass(frozen=True, slots=True)
class ShownMistake:
    """A row whose label the classifier did not predict."""

    row: int
    label: str
    predicted: str
    probability: float
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownClassifier:
    """`confusion[i][j]` rows of label i were predicted to be label j; empty: it was not recorded."""

    step: int
    stream: str  # empty: the run has one
    num_rows: int
    num_wrong: int
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    mistakes: tuple[ShownMistake, ...]


@dataclass(frozen=True, slots=True)
class ShownSample:
    """A text that the run's model generated."""

    step: int
    prompt: str
    text: str


def classifiers_of(run: RecordedRun) -> list[ShownClassifier]:
    """Of the evaluation with the best main metric; of the last one if that has none."""
    lines = [line for line in run.evaluations if list(_classifiers(line))]
    if not lines:
        return []
    best = run.best(run.main_metric)
    at_best = [line for line in lines if best is not None and line["step"] == best[0]]
    return list(_classifiers([*lines[-1:], *at_best][-1]))


def samples_of(run: RecordedRun) -> list[ShownSample]:
    """By prompt, then by step. Of more than `MOST_SAMPLES` of a prompt, evenly many are left out."""
    by_prompt: dict[str, list[ShownSample]] = {}
    for line in run.evaluations:
        for sample in _mappings(line.get("samples")):
            prompt, text = _text(sample.get("prompt")), _text(sample.get("text"))
            by_prompt.setdefault(prompt, []).append(ShownSample(line["step"], prompt, text))
    return [sample for samples in by_prompt.values() for sample in _thinned(samples)]


def _thinned(samples: Sequence[ShownSample]) -> Iterator[ShownSample]:
    every = -(-len(samples) // MOST_SAMPLES)
    yield from samples[:-1:every]
    yield samples[-1]


def _classifiers(line: Mapping[str, Any]) -> Iterator[ShownClassifier]:
    for found in _mappings(line.get("classifiers")):
        num_rows, num_wrong = found.get("num_rows"), found.get("num_wrong")
        if is_int(num_rows) and is_int(num_wrong):
            labels, confusion = _matrix(found.get("labels"), found.get("confusion"))
            yield ShownClassifier(
                step=line["step"],
                stream=_text(found.get("stream")),
                num_rows=num_rows,
                num_wrong=num_wrong,
                labels=labels,
                confusion=confusion,
                mistakes=tuple(_mistakes(found.get("mistakes")))[:_MOST_MISTAKES],
            )


def _matrix(labels: Any, confusion: Any) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Empty unless it is a square of counts, with a label for each row."""
    if not isinstance(labels, list) or not isinstance(confusion, list) or len(labels) > _MOST_LABELS:
        return (), ()
    is_square = len(confusion) == len(labels) and all(
        isinstance(row, list)
        and len(row) == len(labels)
        and all(is_int(count) and count >= 0 for count in row)
        for row in confusion
    )
    if not is_square:
        return (), ()
    return _distinct(labels), tuple(map(tuple, confusion))


def _distinct(labels: Sequence[Any]) -> tuple[str, ...]:
    """Short names that differ: a chart has a row for each."""
    names: dict[str, None] = {}
    for label in map(str, labels):
        name = label if len(label) <= 40 else f"{label[:39]}…"
        names[name if name not in names else f"{name} ({len(names) + 1})"] = None
    return tuple(names)


def _mistakes(found: Any) -> Iterator[ShownMistake]:
    for mistake in _mappings(found):
        row, probability = mistake.get("row"), mistake.get("probability")
        if is_int(row) and is_number(probability):
            label, predicted = _text(mistake.get("label")), _text(mistake.get("predicted"))
            yield ShownMistake(row, label, predicted, probability, _text(mistake.get("text")))


def _mappings(found: Any) -> Iterator[Mapping[str, Any]]:
    yield from (item for item in found if isinstance(item, Mapping)) if isinstance(found, list) else ()


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else ""
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
