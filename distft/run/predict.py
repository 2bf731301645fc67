"""Predictions for the rows of a file, on all ranks; an interrupted command goes on where it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distft.checkpoint.steps import absolute
from distft.collectives import Collectives, ProcessGroup, SingleProcess, all_or_none
from distft.config import parse
from distft.data.labelled import LabelledConfig
from distft.data.labelled_rows import LabelledRows
from distft.data.records import read_records
from distft.data.streams import StreamsConfig
from distft.errors import ConfigError, StorageError
from distft.objective.mixture import Mixture
from distft.objective.row_objective import RowObjective
from distft.run.data_context import data_context
from distft.run.engines import choose_device
from distft.run.prediction_files import BlockFiles, check_output, write_output
from distft.run.pretrained import TrainedModel, load_model, open_model
from distft.topology import Topology

_BLOCK_ROWS = 2048  # what an interruption loses at most, for each rank


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictOptions:
    """What to read of the file. None: as in the training data."""

    text: str | None = None  # a column
    text_pair: str | None = None
    head: str | None = None  # of a mixture: the part whose head predicts


def predict_file(
    path: str,
    rows_path: str,
    output: str,
    topology: Topology,
    options: PredictOptions = PredictOptions(),
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
    trained = open_model(path, overrides, trust=trust)
    for note in trained.notes:
        on_note(note)
    objective, data = _what_predicts(trained, rows_path, options)
    config = trained.config
    assert config.model is not None
    rows, _ = data.open(data_context(trained.tokenizer, config.model, config))
    on_note(rows.summary.splitlines()[0])
    device = choose_device(config, topology)
    collectives: Collectives = SingleProcess()
    if topology.world_size > 1:
        collectives = ProcessGroup(topology, device, config.timeout_s)
    try:
        blocks = BlockFiles(output, _identity(trained, objective, data, rows))
        with all_or_none(collectives, ConfigError):
            if collectives.rank == 0:
                blocks.open()
        collectives.all_gather(None)
        predictor = _Predictor(trained, objective, data, rows, device)
        with all_or_none(collectives, StorageError):
            for start in _own_blocks(rows.num_sequences, collectives):
                stop = min(start + _BLOCK_ROWS, rows.num_sequences)
                if not blocks.has(start, stop - start):
                    blocks.write(start, predictor.predictions(start, stop))
                on_progress(stop - start)
        collectives.all_gather(None)
        with all_or_none(collectives, StorageError):
            if collectives.rank == 0:
                write_output(
                    output, (line for start in _starts(rows.num_sequences) for line in blocks.read(start))
                )
                blocks.remove(_starts(rows.num_sequences))
        return rows.num_sequences
    finally:
        if isinstance(collectives, ProcessGroup):
            collectives.close()


def _what_predicts(
    trained: TrainedModel, rows_path: str, options: PredictOptions
) -> tuple[RowObjective, LabelledConfig]:
    """The objective, and the data as the training data but for its path and without labels."""
    objective: Any = trained.config.objective
    data: Any = trained.config.data
    if isinstance(objective, Mixture):
        parts = [name for name in objective.parts if isinstance(objective.part(name), RowObjective)]
        name = options.head or (parts[0] if len(parts) == 1 else None)
        if name not in parts:
            raise ConfigError(
                f"{trained.source.path} has the parts {', '.join(parts) or 'none'} that predict something of "
                f"a row: name one with --head{'' if name is None else f', and not {name}'}."
            )
        objective = objective.part(name)
        data = data.streams[name].data if isinstance(data, StreamsConfig) else data
    elif options.head is not None:
        raise ConfigError(f"--head {options.head}: {trained.source.path} is no mixture of objectives.")
    if not isinstance(objective, RowObjective):
        kind = getattr(objective, "type", type(objective).__name__)
        raise ConfigError(
            f"{trained.source.path} was trained with objective.type={kind}, which predicts nothing of a row. "
            "`distft generate` continues texts, `distft embed` writes embeddings."
        )
    _require_columns(data, trained, options)
    known = data if isinstance(data, LabelledConfig) else LabelledConfig(path=rows_path)
    changes = {"path": rows_path, "label": None, "labels": "one", "max_rows": None, "shuffle": False}
    changes |= {} if options.text is None else {"text": options.text}
    changes |= {} if options.text_pair is None else {"text_pair": options.text_pair}
    return objective, parse(LabelledConfig, {**known.model_dump(mode="json"), **changes})


def _require_columns(data: Any, trained: TrainedModel, options: PredictOptions) -> None:
    """Raise `ConfigError` for a second text that the model was not trained on."""
    if options.text_pair is None:
        return
    if isinstance(data, LabelledConfig) and data.text_pair is None:
        raise ConfigError(
            f"--text-pair-column {options.text_pair}: {trained.source.path} was trained on one text a row. "
            "Leave it out."
        )
    if options.text_pair == options.text:
        raise ConfigError(f"--text-column and --text-pair-column are both {options.text}: name two columns.")


def _identity(
    trained: TrainedModel, objective: RowObjective, data: LabelledConfig, rows: LabelledRows
) -> dict[str, Any]:
    """What the predictions depend on: only blocks of the same may be used again."""
    progress = trained.source.manifest.progress
    return {
        "model": absolute(trained.source.path),
        "run_id": trained.source.manifest.run_id,
        "step": progress.step,
        "param_dtype": trained.config.engine.param_dtype,
        "objective": objective.model_dump(mode="json"),
        "seq_len": trained.config.batch.seq_len,
        "tokenizer": trained.tokenizer.fingerprint,
        "data": data.model_dump(mode="json"),
        "rows": rows.fingerprint,
        "num_rows": rows.num_sequences,
        "block_rows": _BLOCK_ROWS,
    }


def _starts(num_rows: int) -> range:
    return range(0, num_rows, _BLOCK_ROWS)


def _own_blocks(num_rows: int, collectives: Collectives) -> Iterator[int]:
    yield from _starts(num_rows)[collectives.dp_rank :: collectives.dp_world_size]


class _Predictor:
    """Predicts rows with one model."""

    def __init__(
        self,
        trained: TrainedModel,
        objective: RowObjective,
        data: LabelledConfig,
        rows: LabelledRows,
        device: torch.device,
    ) -> None:
        module = load_model(trained, device)
        self._module = module
        self._objective = objective
        self._rows = rows
        self._device = device
        names = trained.label_names
        self._label_names = names.get(objective.head_name) if isinstance(names, Mapping) else names
        self._batch_size = trained.config.evaluation.micro_batch_size or trained.config.batch.micro_batch_size
        texts = [data.text] if data.text_pair is None else [data.text, data.text_pair]
        self._records = read_records(data.path, texts=texts, labels=[])

    @torch.no_grad()
    def predictions(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Of rows [start, stop): the line in the file, the texts, and what the objective predicts."""
        for first in range(start, stop, self._batch_size):
            indices = np.arange(first, min(first + self._batch_size, stop), dtype=np.int64)
            outputs = self._objective.outputs(self._module, self._rows.batch(indices).to(self._device))
            predicted = self._objective.predictions(outputs.double().cpu(), self._label_names)
            for index, values in zip(indices.tolist(), predicted, strict=True):
                record = self._records[index]
                yield {"line": record.line, **record.values, **values}
