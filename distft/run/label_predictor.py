"""Predicts labels or numbers of rows with one model, or with several together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from distft import storage
from distft.collectives import Collectives
from distft.data.batch import Batch
from distft.data.sampler import Indices
from distft.errors import ConfigError
from distft.model.with_heads import ModelWithHeads
from distft.objective.row_objective import RowObjective
from distft.run.combination import combined
from distft.run.ensemble import find_weights, label_order
from distft.run.prediction_rows import PredictionRows, PredictOptions, model_identity
from distft.run.pretrained import TrainedModel, load_model

_BLOCK_ROWS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """One of the models that predict, with the file's rows as it reads them."""

    trained: TrainedModel
    rows: PredictionRows

    @property
    def identity(self) -> dict[str, Any]:
        """What its predictions depend on."""
        trained, tokenizer = self.trained, self.trained.own_tokenizer
        return {
            **model_identity(trained),
            "objective": self.rows.objective.model_dump(mode="json"),
            "seq_len": trained.config.batch.seq_len,
            "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
            "data": self.rows.data.model_dump(mode="json"),
            "rows": self.rows.fingerprint,
        }

    def batch(self, indices: Indices, device: torch.device) -> Batch:
        return self.rows.rows.batch(indices).to(device)


class LabelPredictor:
    """What the models' objectives predict of the rows of a file."""

    def __init__(
        self,
        trained: Sequence[TrainedModel],
        rows_path: str,
        output: str,
        options: PredictOptions,
        *,
        overrides: Sequence[str],
        trust: bool,
        on_note: Callable[[str], None],
    ) -> None:
        """Reads and encodes all rows. Raises `ConfigError` and `DataError` as `PredictionRows.open` does."""
        if options.generation is not None:
            raise ConfigError(
                f"{trained[0].source.path} predicts labels: --max-new-tokens, --stop, --temperature and "
                "--seed are for language models. Leave them out."
            )
        self._members = [
            _Member(trained=one, rows=PredictionRows.open(one, rows_path, options)) for one in trained
        ]
        first = self._members[0].rows
        _require_output_elsewhere(output, first)
        self._options, self._overrides, self._trust, self._on_note = options, overrides, trust, on_note
        self._weights: Sequence[float] | None = None
        self._modules: list[ModelWithHeads] = []
        self._device = torch.device("cpu")
        objective, names = first.objective, trained[0].label_names
        self._label_names = names.get(objective.head_name) if isinstance(names, Mapping) else names
        config = trained[0].config
        self._batch_size = config.evaluation.micro_batch_size or config.batch.micro_batch_size
        self._given = first.given()
        self.num_rows, self.block_rows = first.rows.num_sequences, _BLOCK_ROWS
        self.summary = first.rows.summary

    def identity(self, collectives: Collectives, device: torch.device) -> dict[str, Any]:
        """What the predictions depend on; finds the weights of an ensemble, by all ranks together."""
        first, *others = self._members
        options = self._options
        if others and options.combine == "weights":
            self._weights = self._find_weights(collectives, device)
        ensemble = {
            "others": [other.identity for other in others],
            "combine": options.combine,
            "weights": self._weights,
        }
        return {**first.identity, **(ensemble if others else {})}

    def _find_weights(self, collectives: Collectives, device: torch.device) -> Sequence[float]:
        paths = [member.trained.source.path for member in self._members]
        weights, note = find_weights(paths, self._overrides, collectives, device, trust=self._trust)
        if weights is None:
            raise ConfigError(f"--combine weights: {note}. Take mean or vote.")
        self._on_note(f"{note}: {', '.join(f'{weight:.4g}' for weight in weights)}")
        return weights

    def load(self, device: torch.device) -> None:
        """Load the models' weights."""
        self._modules = [load_model(member.trained, device) for member in self._members]
        self._device = device

    @torch.no_grad()
    def predictions(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Of rows [start, stop): the line in the file, the texts, and what the objective predicts."""
        for first in range(start, stop, self._batch_size):
            indices = np.arange(first, min(first + self._batch_size, stop), dtype=np.int64)
            for index, values in zip(indices.tolist(), self._predict(indices), strict=True):
                yield {**self._given[index], **values}

    def _predict(self, indices: Indices) -> Sequence[Mapping[str, Any]]:
        objective = self._members[0].rows.objective
        if isinstance(objective, RowObjective):
            return objective.predictions(self._outputs(indices), self._label_names)
        batch = self._members[0].batch(indices, self._device)
        classes = objective.word_labels(self._modules[0], batch)
        return [objective.predictions(own, self._label_names) for own in classes]

    def _outputs(self, indices: Indices) -> Tensor:
        """float64 [B, K]: of several members the logarithms of their probabilities together."""
        outputs = [
            cast("RowObjective", member.rows.objective)
            .outputs(module, member.batch(indices, self._device))
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
        return combined(torch.stack(in_order), self._options.combine, self._weights or ())


def _require_output_elsewhere(output: str, rows: PredictionRows) -> None:
    """Raise `ConfigError` for an output among the images: the same command would then read it as one."""
    folder, file = storage.local_path(rows.data.path or ""), storage.local_path(output)
    if folder is None or file is None or not folder.is_dir():
        return
    if folder.resolve() in file.resolve().parents:
        raise ConfigError(f"--output {output} is in {folder}, whose files are images: choose another place.")
