"""What a run records of an evaluation besides its metrics: confusion, mistakes and texts, bounded in size."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from distft.data.feed import AnyFeed, StreamFeed
from distft.objective.findings import ClassifierFindings, Mistake
from distft.run.run_inputs import RunInputs

_MOST_TOKENS = 128  # of a row whose text is shown
_MOST_CHARACTERS = 400


def classifier_records(inputs: RunInputs, sums: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A record for each classifier that was evaluated: its confusion matrix, and its surest mistakes."""
    found = inputs.config.objective.findings(sums, inputs.label_names)
    return [_record(inputs, stream, findings) for stream, findings in found.items()]


def _record(inputs: RunInputs, stream: str, found: ClassifierFindings) -> dict[str, Any]:
    mistakes = [
        {
            "row": mistake.number + 1,
            "label": mistake.label[:_MOST_CHARACTERS],
            "predicted": mistake.predicted[:_MOST_CHARACTERS],
            "probability": round(mistake.probability, 4),
            "text": _text_of(inputs, stream, mistake),
        }
        for mistake in found.mistakes
    ]
    matrix = {} if found.confusion is None else {"labels": list(found.labels), "confusion": found.confusion}
    counts = {"num_rows": found.num_rows, "num_wrong": found.num_wrong}
    return {"stream": stream, **counts, **matrix, "mistakes": mistakes}


def _text_of(inputs: RunInputs, stream: str, mistake: Mistake) -> str | None:
    """The row's text as the model read it, cut; None: it has none."""
    feed: AnyFeed | None = inputs.validation
    if isinstance(feed, StreamFeed):
        feed = feed.streams.get(stream)
    if inputs.tokenizer is None or feed is None or isinstance(feed, StreamFeed):
        return None
    batch = feed.rows(np.array([mistake.number]))
    if batch.images is not None and not batch.is_captioned:
        return None
    length = batch.input_ids.shape[1] if batch.lengths is None else int(batch.lengths[0])
    text = inputs.tokenizer.decode(batch.input_ids[0, : min(length, _MOST_TOKENS)].tolist())
    is_cut = length > _MOST_TOKENS or len(text) > _MOST_CHARACTERS
    return text[:_MOST_CHARACTERS] + ("…" if is_cut else "")
