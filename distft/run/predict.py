"""Predictions for the rows of a file, on all ranks; an interrupted command goes on where it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from distft.collectives import Collectives, all_or_none
from distft.errors import ConfigError, StorageError
from distft.run.block_files import BlockFiles
from distft.run.ensemble import open_members
from distft.run.label_predictor import LabelPredictor
from distft.run.prediction_files import check_output, write_output
from distft.run.prediction_rows import PredictOptions
from distft.run.pretrained import open_model, ranks_of
from distft.run.text_predictor import TextPredictor, generates_texts
from distft.topology import Topology


class Predictor(Protocol):
    """Predicts something of each row of a file."""

    num_rows: int
    block_rows: int  # that are written together: what an interruption loses at most, for each rank
    summary: str

    def identity(self, collectives: Collectives, device: torch.device) -> Mapping[str, Any]:
        """What the predictions depend on: only blocks of the same are used again. All ranks call it."""

    def load(self, device: torch.device) -> None:
        """Load the models' weights."""

    def predictions(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Of rows [start, stop), one block: where each is in the file, its input, and what is predicted."""


def predict_file(
    path: str,
    rows_path: str,
    output: str,
    topology: Topology,
    options: PredictOptions | None = None,
    *,
    overrides: Sequence[str] = (),
    trust: bool = False,
    on_note: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write a prediction for each row of `rows_path` to `output`, in the file's order; returns their number.

    `output` ends in .jsonl, .csv, .tsv or .parquet. It appears when it is complete; until then a directory
    `output`.parts has what is done, from which the same command goes on. Raises `ConfigError` for a model
    that predicts nothing of a row, and the errors of reading the data, before it uses a device.
    """
    check_output(output)
    options = options or PredictOptions()
    if options.others:
        members = open_members([path, *options.others], overrides, trust=trust, on_note=on_note)
    else:
        members = [open_model(path, overrides, trust=trust)]
        for note in members[0].notes:
            on_note(note)
    predictor: Predictor
    if generates_texts(members[0], options):
        predictor = TextPredictor(members[0], rows_path, options, on_note=on_note)
    else:
        predictor = LabelPredictor(
            members, rows_path, output, options, overrides=overrides, trust=trust, on_note=on_note
        )
    on_note(predictor.summary.splitlines()[0])
    with ranks_of(members[0].config, topology) as (collectives, device):
        _write(predictor, output, collectives, device, on_progress)
    return predictor.num_rows


def _write(
    predictor: Predictor,
    output: str,
    collectives: Collectives,
    device: torch.device,
    on_progress: Callable[[int], None],
) -> None:
    size, starts = predictor.block_rows, range(0, predictor.num_rows, predictor.block_rows)
    identity = predictor.identity(collectives, device)
    blocks = BlockFiles(output, {**identity, "num_rows": predictor.num_rows, "block_rows": size})
    with all_or_none(collectives, ConfigError):
        if collectives.rank == 0:
            blocks.open()
    collectives.all_gather(None)
    predictor.load(device)
    with all_or_none(collectives, StorageError):
        for start in starts[collectives.dp_rank :: collectives.dp_world_size]:
            stop = min(start + size, predictor.num_rows)
            if not blocks.has(start, stop - start):
                blocks.write(start, predictor.predictions(start, stop))
            on_progress(stop - start)
    collectives.all_gather(None)
    with all_or_none(collectives, StorageError):
        if collectives.rank == 0:
            write_output(output, (line for start in starts for line in blocks.read(start)))
            blocks.remove(starts)
