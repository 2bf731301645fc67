"""The rows that `distft predict` reads: a file's, in the model's own kind of data, without their labels."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np

from distft.checkpoint.steps import absolute
from distft.config import parse
from distft.data.image_rows import ImageRows
from distft.data.image_sources import read_images
from distft.data.images import ImagesConfig
from distft.data.labelled import LabelledConfig
from distft.data.labelled_rows import LabelledRows, RowTargets
from distft.data.records import read_records
from distft.data.streams import StreamsConfig
from distft.data.targets import ROW
from distft.data.token_label_rows import TokenLabelRows
from distft.data.token_labels import TokenLabelsConfig
from distft.errors import ConfigError, ErrorCollector
from distft.objective.mixture import Mixture
from distft.objective.row_objective import RowObjective
from distft.objective.token_classification import TokenClassification
from distft.run.combination import Combine
from distft.run.data_context import data_context
from distft.run.generate import GenerationOptions
from distft.run.pretrained import TrainedModel
from distft.storage import checksum_of_bytes

GREEDY = GenerationOptions(max_new_tokens=128, temperature=0.0)
Predicting: TypeAlias = RowObjective | TokenClassification
_RowsConfig: TypeAlias = LabelledConfig | TokenLabelsConfig | ImagesConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictOptions:
    """What to read of the file. None: as in the training data."""

    text: str | None = None  # a column
    text_pair: str | None = None
    image: str | None = None  # of a .parquet file
    head: str | None = None  # of a mixture: the part whose head predicts
    others: Sequence[str] = ()  # further classifiers of the same labels, which predict together
    combine: Combine = "mean"  # how they do
    generation: GenerationOptions | None = None  # of a language model; None: GREEDY


def model_identity(trained: TrainedModel) -> dict[str, Any]:
    """What a model's predictions depend on, beside the rows."""
    manifest = trained.source.manifest
    return {
        "model": absolute(trained.source.path),
        "run_id": manifest.run_id,
        "step": manifest.progress.step,
        "param_dtype": trained.config.engine.param_dtype,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionRows:
    """The rows of a file as one model reads them."""

    objective: Predicting
    data: _RowsConfig
    rows: LabelledRows | TokenLabelRows | ImageRows
    places: Sequence[str] = ()  # of images: the file of each, or its number in a .parquet file

    @classmethod
    def open(cls, trained: TrainedModel, path: str, options: PredictOptions) -> Self:
        """Read and encode all rows.

        Raises `ConfigError` for a model that predicts nothing of such, and `DataError` with every bad row.
        """
        objective, data = _what_predicts(trained, path, options)
        model = trained.config.model
        assert model is not None
        objective.check_model(model)
        if isinstance(data, ImagesConfig):
            assert model.image_shape is not None
            table = read_images(data, model.image_shape, ignores_classes=True)
            targets = RowTargets(ROW, np.zeros(len(table.images), np.int64))
            summary = f"{data.name}: {len(table.images):,} images"
            rows = ImageRows(table.images, targets, summary=summary)
            return cls(objective=objective, data=data, rows=rows, places=table.places)
        text_rows, _ = data.open(data_context(trained.tokenizer, model, trained.config))
        return cls(objective=objective, data=data, rows=text_rows)

    @property
    def fingerprint(self) -> str:
        """Of the rows and of what names them."""
        return f"{self.rows.fingerprint}-{checksum_of_bytes(json.dumps(self.places).encode())}"

    def given(self) -> list[dict[str, Any]]:
        """Of each row its line in the file, and its texts; of an image its file, or its row in one."""
        if isinstance(self.data, ImagesConfig):
            is_parquet = self.data.is_parquet
            numbered = enumerate(self.places, start=1)
            return [{"row": row} if is_parquet else {"image": place} for row, place in numbered]
        return list(_given(self.data))


def _given(data: LabelledConfig | TokenLabelsConfig) -> Iterator[dict[str, Any]]:
    if isinstance(data, TokenLabelsConfig):
        for sentence in data.read():
            yield {"line": sentence.line, "tokens": list(sentence.words)}
        return
    texts = [data.text] if data.text_pair is None else [data.text, data.text_pair]
    for record in read_records(data.path, texts=texts, labels=[]):
        yield {"line": record.line, **record.values}


def _what_predicts(
    trained: TrainedModel, rows_path: str, options: PredictOptions
) -> tuple[Predicting, _RowsConfig]:
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
            "`distft embed` writes embeddings."
        )
    if trained.own_tokenizer is None:
        return objective, _image_files(data, rows_path, options)
    if options.image is not None:
        raise ConfigError(f"--image-column: {trained.source.path} reads texts. Leave it out.")
    if isinstance(objective, TokenClassification):
        return objective, _sentences(data, rows_path, options)
    _require_columns(data, trained, options)
    known = data if isinstance(data, LabelledConfig) else LabelledConfig(path=rows_path)
    changes = {"path": rows_path, "label": None, "labels": "one", "max_rows": None, "shuffle": False}
    changes |= {} if options.text is None else {"text": options.text}
    changes |= {} if options.text_pair is None else {"text_pair": options.text_pair}
    return objective, parse(LabelledConfig, {**known.model_dump(mode="json"), **changes})


def _image_files(data: Any, rows_path: str, options: PredictOptions) -> ImagesConfig:
    """Raises `ConfigError` for columns that are not read."""
    errors = ErrorCollector()
    for option, column in (("--text-column", options.text), ("--text-pair-column", options.text_pair)):
        with errors.collect():
            if column is not None:
                raise ConfigError(
                    f"{option} {column}: the model reads images; --image-column names their column of a "
                    ".parquet file."
                )
    column = data.image if isinstance(data, ImagesConfig) else "image"
    given = {"path": rows_path, "image": options.image or column, "label": None, "shuffle": False}
    found: ImagesConfig = parse(ImagesConfig, given)
    with errors.collect():
        if options.image is not None and not found.is_parquet:
            raise ConfigError(
                f"--image-column {options.image} is a column of a .parquet file, and {rows_path} is none: "
                "leave it out."
            )
    errors.raise_if_any()
    return found


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
