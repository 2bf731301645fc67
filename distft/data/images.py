"""Settings of images: a folder, a Parquet file or scikit-learn's digits, with classes, texts, or alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.config import PathText, Settings
from distft.data.dataset import ClassNames, DataContext, TextTemplate, check_vocabulary
from distft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distft.data.batch import RaggedArray
    from distft.data.feed import Feed
    from distft.data.image_rows import ImageRows
    from distft.data.image_sources import ImageTable, Problems
    from distft.data.labelled_rows import LabelNames, RowTargets

_MOST_VIEWS = 16


class AugmentConfig(Settings):
    """Random changes of each image, another one in each epoch and view."""

    shift: int = Field(
        0, ge=0, le=4096
    )  # pixels, at most, in each direction: a random crop of it within zeros
    flip: bool = False  # half of the images are mirrored, left to right

    @property
    def changes_images(self) -> bool:
        return self.shift > 0 or self.flip


class ImagesConfig(Settings):
    """Images of one size, as the model reads them, decoded at the start of the run and kept in memory.

    A folder has a subfolder for each class, with its images. A Parquet file has a column of image files, as
    bytes. `source: digits` are four fifths of scikit-learn's 1,797 handwritten digits, 8 x 8 pixels with the
    classes `zero` to `nine`; `digits_held_out` is every fifth of them.
    """

    type: Literal["images"] = "images"
    path: PathText | None = None  # a folder or a .parquet file
    source: Literal["digits", "digits_held_out"] | None = None  # in place of path
    image: str = "image"  # Parquet: column of the images
    # Parquet: column of the classes; null: unlabelled, and a folder has images alone.
    label: str | None = "label"
    text: str | None = None  # each image's text: a column of Parquet, or label for the name of its class
    # Of each image, augmented anew: for objective.type=contrastive
    views: int = Field(1, ge=1, le=_MOST_VIEWS)
    augment: AugmentConfig = AugmentConfig()
    max_rows: int | None = Field(None, ge=1)
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)  # of the order and of the augmentation

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        problems = []
        if self.path is None and self.source is None:
            problems.append("set either path (a folder or a .parquet file) or source=digits")
        if self.path is not None and self.source is not None:
            problems.append(
                f"path={self.path} and source={self.source} are both set: unset one, such as by source=null"
            )
        if self.views > 1 and not self.augment.changes_images:
            problems.append(
                f"views={self.views} of an image would be equal: set augment.shift or augment.flip"
            )
        if self.views > 1 and self.text is not None:
            problems.append(f"views={self.views} with text: an image and its text are a pair already")
        if not self.is_parquet and self.text not in {None, "label"}:
            problems.append(
                f"text={self.text} is a column of a .parquet file: here, text=label is all there is"
            )
        if not self.is_parquet and self.text == "label" and self.label is None:
            problems.append("text=label needs the classes: leave label out")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def is_parquet(self) -> bool:
        return self.path is not None and self.path.endswith(".parquet")

    @property
    def name(self) -> str:
        """Of the data, for messages."""
        return self.path or f"source={self.source}"

    def build(self, context: DataContext) -> Feed:
        """Infinite epochs for training. Classes get their ids here unless `context` has label names."""
        from distft.data.feed import Feed

        rows, names = self.open(context)
        if self.text is not None and rows.num_distinct_texts < 2:
            raise DataError(
                f"{self.name}: all {rows.num_sequences:,} texts are equal, so no text is another's negative "
                "and nothing can be learnt: take texts that differ."
            )
        feed = Feed.for_training(
            rows,
            seed=self.data_seed,
            shuffle=self.shuffle,
            label_names=names,
            label_counts=rows.label_counts,
        )
        return self._augmented(feed)

    def build_for_evaluation(self, context: DataContext) -> Feed:
        """Every image once, in the data's order."""
        from distft.data.feed import Feed

        rows, names = self.open(context)
        return self._augmented(Feed.for_evaluation(rows, label_names=names))

    def _augmented(self, feed: Feed) -> Feed:
        from distft.data.image_rows import Augmentation

        if not self.augment.changes_images:
            return feed
        return feed.with_transforms(
            Augmentation(shift=self.augment.shift, flips=self.augment.flip, seed=self.data_seed)
        )

    def open(self, context: DataContext) -> tuple[ImageRows, ClassNames | None]:
        """Read and decode all images: the rows, and the names of their classes.

        Raises `DataError` with every problem and its file, `ConfigError` if the model does not read these.
        """
        from distft.data.image_rows import ImageRows, describe
        from distft.data.image_sources import Problems, read_images

        self._check_model(context)
        assert context.image_shape is not None
        problems = Problems(self.name)
        table = read_images(self, context.image_shape, problems=problems)
        names = None if self.label is None else self._label_names(table, context)
        targets = self._targets(table, names, problems)
        texts = None if self.text is None else self._encode_texts(table, context, problems)
        problems.raise_if_any()
        if names is not None and context.label_names is None and len(names.names) < 2:
            raise DataError(
                f"{self.name} has only one class, {names.names[0]!r}, of {len(table.labels):,} images: a "
                "classification needs two or more."
            )
        if texts is not None:
            check_vocabulary(self.name, texts.max_value, context)
        summary = describe(self.name, table, None if names is None else names.names)
        rows = ImageRows(
            table.images,
            targets,
            texts=texts,
            views=self.views,
            pad_id=context.pad_id or 0,
            summary=summary,
        )
        return rows, None if names is None else names.names

    def _check_model(self, context: DataContext) -> None:
        if context.image_shape is None:
            raise ConfigError(
                "data.type=images, and the model reads no images: set model.type to vit, image_cnn or clip."
            )
        if self.text is None and context.reads_tokens:
            raise ConfigError(
                "data.type=images without texts, and model.type=clip reads an image with its text: set text "
                "of the data, such as label for the names of classes."
            )
        if self.text is not None and not context.reads_tokens:
            raise ConfigError(
                f"text={self.text} of data.type=images, and the model reads images alone: leave text out, or "
                "set model.type=clip."
            )
        smaller = min(context.image_shape[1:])
        if self.augment.shift >= smaller:
            raise ConfigError(
                f"data.augment.shift={self.augment.shift} of images of {smaller} pixels would leave nothing "
                f"of some: lower it, such as to {smaller // 8}."
            )

    def _label_names(self, table: ImageTable, context: DataContext) -> LabelNames:
        from distft.data.labelled_rows import LabelNames

        if context.label_names is not None:
            assert isinstance(context.label_names, tuple)  # of this stream
            return LabelNames(context.label_names)
        return LabelNames.from_labels(table.labels)

    def _targets(self, table: ImageTable, names: LabelNames | None, problems: Problems) -> RowTargets:
        import numpy as np

        from distft.data.labelled_rows import RowTargets
        from distft.data.targets import IGNORE_INDEX, LABEL, ROW

        if names is None:
            return RowTargets(ROW, np.zeros(len(table.images), np.int64))
        known = {name: number for number, name in enumerate(names.names)}
        for where, label in zip(table.places, table.labels, strict=True):
            if label not in known:
                problems.add(where, names.unknown_label_message(label))
        ids = [known.get(label, IGNORE_INDEX) for label in table.labels]
        return RowTargets(LABEL, np.array(ids, np.int64))

    def _encode_texts(self, table: ImageTable, context: DataContext, problems: Problems) -> RaggedArray:
        """A row of at most `seq_len` tokens for each image's text."""
        from distft.data.batch import RaggedArray

        template = context.template or TextTemplate()
        encoded: dict[str, Sequence[int]] = {}
        for where, text in zip(table.places, table.texts, strict=True):
            if text not in encoded:
                ids = context.encode(text)
                if not ids:
                    problems.add(where, f"its text {text[:60]!r} encodes to no tokens.")
                encoded[text] = template.row(ids, context.seq_len)
        return RaggedArray([encoded[text] for text in table.texts])
