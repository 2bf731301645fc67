"""`distft predict` in small blocks, on any ranks, and interrupted in the third one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distft.run import label_predictor
from distft.run.predict import predict_file
from distft.topology import Topology

BLOCK_ROWS = 4


def predict_in_small_blocks(topology: Topology, model: str, rows: str, output: str) -> int:
    """For a process of its own, whose block size it changes."""
    label_predictor._BLOCK_ROWS = BLOCK_ROWS
    return predict_file(model, rows, output, topology)


def interrupt_in_the_third_block(
    model: str, rows: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predict until two blocks of `BLOCK_ROWS` rows are written, which stay in `output`.parts."""
    predictions, done = label_predictor.LabelPredictor.predictions, []

    def fail_in_the_third_block(self: Any, start: int, stop: int) -> Iterator[dict[str, Any]]:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(start)
        return predictions(self, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(label_predictor, "_BLOCK_ROWS", BLOCK_ROWS)
        patch.setattr(label_predictor.LabelPredictor, "predictions", fail_in_the_third_block)
        with pytest.raises(KeyboardInterrupt):
            predict_file(model, rows, str(output), Topology())
    assert len(list(Path(f"{output}.parts").glob("rows_*"))) == 2
    assert not output.exists()


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
