"""Predictions for the rows of a file, on all ranks; an interrupted command goes on where it was."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from distft.checkpoint.steps import absolute
from distft.collectives import Collectives, all_or_none
from distft.config import parse
from distft.data.labelled import LabelledConfig
from distft.data.labelled_rows import LabelledRows
from distft.data.records import read_records
from distft.data.sampler import Indices
from distft.data.streams import StreamsConfig
from distft.data.token_label_rows import TokenLabelRows
from distft.data.token_labels import TokenLabelsConfig
from distft.errors import ConfigError, StorageError
from distft.objective.mixture import Mixture
from distft.objective.row_objective import RowObjective
from distft.objective.token_classification import TokenClassification
from distft.run.block_files import BlockFiles
from distft.run.combination import Combine, combined
from distft.run.data_context import data_context
from distft.run.ensemble import find_weights, label_order, open_members
from distft.run.prediction_files import check_output, write_output
from distft.run.pretrained import TrainedModel, load_model, open_model, ranks_of
from distft.topology import Topology

Predicting: TypeAlias = RowObjective | TokenClassification
_BLOCK_ROWS = 2048  # what an interruption loses at most, for each rank


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictOptions:
    """What to read of the file. None: as in the training data."""

    text: str | None = None  # a column
    text_pair: str | None = None
    head: str | None = None  # of a mixture: the part whose head predicts
    others: Sequence[str] = ()  # further classifiers of the same labels, which predict together
    combine: Combine = "mean"  # how they do


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
    if options.others:
        members = open_members([path, *options.others], overrides, trust=trust, on_note=on_note)
    else:
        members = [open_model(path, overrides, trust=trust)]
        for note in members[0].notes:
            on_note(note)
    predictors = [_Member.open(trained, rows_path, options) for trained in members]
    rows = predictors[0].rows
    on_note(rows.summary.splitlines()[0])
    with ranks_of(members[0].config, topology) as (collectives, device):
        weights = None
        if options.others and options.combine == "weights":
            paths = [path, *options.others]
            weights, note = find_weights(paths, overrides, collectives, device, trust=trust)
            if weights is None:
                raise ConfigError(f"--combine weights: {note}. Take mean or vote.")
            on_note(f"{note}: {', '.join(f'{weight:.4g}' for weight in weights)}")
        blocks = BlockFiles(output, _identity(predictors, options, weights))
        with all_or_none(collectives, ConfigError):
            if collectives.rank == 0:
                blocks.open()
        collectives.all_gather(None)
        predictor = _Predictor(predictors, options.combine, weights or (), device)
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


def _what_predicts(
    trained: TrainedModel, rows_path: str, options: PredictOptions
) -> tuple[Predicting, LabelledConfig | TokenLabelsConfig]:
    """The objective, and the data as the training data but for its path and without labels."""
    objective: Any = trained.config.objective
    data: Any = trained.config.data
    if isinstance(objective, Mixture):
        parts = [name for name in objective.parts if isinstance(objective.part(name), Predicting)]
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
    if not isinstance(objective, Predicting):
        kind = getattr(objective, "type", type(objective).__name__)
        raise ConfigError(
            f"{trained.source.path} was trained with objective.type={kind}, which predicts nothing of a row. "
            "`distft generate` continues texts, `distft embed` writes embeddings."
        )
    if isinstance(objective, TokenClassification):
        return objective, _sentences(data, rows_path, options)
    _require_columns(data, trained, options)
    known = data if isinstance(data, LabelledConfig) else LabelledConfig(path=rows_path)
    changes = {"path": rows_path, "label": None, "labels": "one", "max_rows": None, "shuffle": False}
    changes |= {} if options.text is None else {"text": options.text}
    changes |= {} if options.text_pair is None else {"text_pair": options.text_pair}
    return objective, parse(LabelledConfig, {**known.model_dump(mode="json"), **changes})


def _sentences(data: Any, rows_path: str, options: PredictOptions) -> TokenLabelsConfig:
    if options.text_pair is not None:
        raise ConfigError(
            "--text-pair-column: a model of token labels reads one list of words. Leave it out."
        )
    known = data if isinstance(data, TokenLabelsConfig) else TokenLabelsConfig(path=rows_path)
    changes = {"path": rows_path, "labels": None, "max_rows": None, "shuffle": False}
    changes |= {} if options.text is None else {"tokens": options.text}
    return parse(TokenLabelsConfig, {**known.model_dump(mode="json"), **changes})


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """One of the models that predict, with the file's rows as it reads them."""

    trained: TrainedModel
    objective: Predicting
    data: LabelledConfig | TokenLabelsConfig
    rows: LabelledRows | TokenLabelRows

    @classmethod
    def open(cls, trained: TrainedModel, rows_path: str, options: PredictOptions) -> Self:
        objective, data = _what_predicts(trained, rows_path, options)
        config = trained.config
        assert config.model is not None
        rows, _ = data.open(data_context(trained.tokenizer, config.model, config))
        return cls(trained=trained, objective=objective, data=data, rows=rows)

    @property
    def identity(self) -> dict[str, Any]:
        """What its predictions depend on."""
        trained = self.trained
        return {
            "model": absolute(trained.source.path),
            "run_id": trained.source.manifest.run_id,
            "step": trained.source.manifest.progress.step,
            "param_dtype": trained.config.engine.param_dtype,
            "objective": self.objective.model_dump(mode="json"),
            "seq_len": trained.config.batch.seq_len,
            "tokenizer": trained.tokenizer.fingerprint,
            "data": self.data.model_dump(mode="json"),
            "rows": self.rows.fingerprint,
        }


def _identity(
    members: Sequence[_Member], options: PredictOptions, weights: Sequence[float] | None
) -> dict[str, Any]:
    """What the predictions depend on: only blocks of the same may be used again."""
    first, *others = members
    ensemble = {"others": [o.identity for o in others], "combine": options.combine, "weights": weights}
    return {
        **first.identity,
        "num_rows": first.rows.num_sequences,
        "block_rows": _BLOCK_ROWS,
        **(ensemble if others else {}),
    }


def _starts(num_rows: int) -> range:
    return range(0, num_rows, _BLOCK_ROWS)


def _own_blocks(num_rows: int, collectives: Collectives) -> Iterator[int]:
    yield from _starts(num_rows)[collectives.dp_rank :: collectives.dp_world_size]


def _given(data: LabelledConfig | TokenLabelsConfig) -> Iterator[dict[str, Any]]:
    """Of each row its line in the file, and its texts."""
    if isinstance(data, TokenLabelsConfig):
        for sentence in data.read():
            yield {"line": sentence.line, "tokens": list(sentence.words)}
        return
    texts = [data.text] if data.text_pair is None else [data.text, data.text_pair]
    for record in read_records(data.path, texts=texts, labels=[]):
        yield {"line": record.line, **record.values}


class _Predictor:
    """Predicts rows with one model, or with several together."""

    def __init__(
        self, members: Sequence[_Member], combine: Combine, weights: Sequence[float], device: torch.device
    ) -> None:
        self._members = members
        self._modules = [load_model(member.trained, device) for member in members]
        self._combine, self._weights = combine, weights
        self._device = device
        trained, objective, data = members[0].trained, members[0].objective, members[0].data
        names = trained.label_names
        self._label_names = names.get(objective.head_name) if isinstance(names, Mapping) else names
        self._batch_size = trained.config.evaluation.micro_batch_size or trained.config.batch.micro_batch_size
        self._given = list(_given(data))

    @torch.no_grad()
    def predictions(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Of rows [start, stop): the line in the file, the texts, and what the objective predicts."""
        for first in range(start, stop, self._batch_size):
            indices = np.arange(first, min(first + self._batch_size, stop), dtype=np.int64)
            for index, values in zip(indices.tolist(), self._predict(indices), strict=True):
                yield {**self._given[index], **values}

    def _predict(self, indices: Indices) -> Sequence[Mapping[str, Any]]:
        objective = self._members[0].objective
        if isinstance(objective, RowObjective):
            return objective.predictions(self._outputs(indices), self._label_names)
        batch = self._members[0].rows.batch(indices).to(self._device)
        classes = objective.word_labels(self._modules[0], batch)
        return [objective.predictions(own, self._label_names) for own in classes]

    def _outputs(self, indices: Indices) -> Tensor:
        """float64 [B, K]: of several members the logarithms of their probabilities together."""
        outputs = [
            cast("RowObjective", member.objective)
            .outputs(module, member.rows.batch(indices).to(self._device))
            .double()
            .cpu()
            for member, module in zip(self._members, self._modules, strict=True)
        ]
        if len(outputs) == 1:
            return outputs[0]
        first = self._members[0].trained
        in_order = [
            output.log_softmax(dim=1)[:, label_order(member.trained, first)]
            for member, output in zip(self._members, outputs, strict=True)
        ]
        return combined(torch.stack(in_order), self._combine, self._weights)
