"""Reads images with their classes and texts from a folder, a Parquet file, or scikit-learn's digits.

Files are of anyone's making: what they declare is checked before anything is decoded, and an image has
exactly the size and channels that the model reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distft import storage
from distft.data.class_names import NamedClasses, named_classes
from distft.data.compressed import MAX_ROW_BYTES, read_error
from distft.data.image_decoding import DECODED_SUFFIXES, decode
from distft.data.parquet_rows import parquet_metadata, parquet_rows
from distft.data.rows import text_problem
from distft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from distft.data.images import ImagesConfig

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT_SHAPE = (1, 8, 8)
_HELD_OUT_EVERY = 5
_MAX_SHOWN = 10  # problems in a message


@dataclass(slots=True)
class Problems:
    """Collects what is wrong with the images of one data set into one `DataError`."""

    name: str  # of the data
    messages: list[str] = field(default_factory=list)

    def add(self, where: str, problem: str) -> None:
        self.messages.append(f"{where}: {problem}")

    def raise_if_any(self) -> None:
        """Raise `DataError` with the first problems, and the number of others."""
        if self.messages:
            shown = self.messages[:_MAX_SHOWN]
            if num_others := len(self.messages) - len(shown):
                shown.append(f"... and {num_others:,} more in {self.name}.")
            raise DataError("\n".join(shown))


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTable:
    """Images with their classes and texts, one of each for every image; empty: there are none."""

    images: NDArray[np.uint8]  # [N, channels, height, width]
    places: list[str]  # file of each, or file and row
    labels: list[str]
    texts: list[str]
    notes: tuple[str, ...] = ()  # on what was not used of the data


@dataclass(frozen=True, slots=True)
class _Entry:
    """An image's file, not decoded, or what keeps it from being read."""

    where: str
    data: bytes
    label: str = ""
    text: str = ""
    problems: tuple[str, ...] = ()


def read_images(
    config: ImagesConfig,
    shape: tuple[int, int, int],
    *,
    ignores_classes: bool = False,
    problems: Problems | None = None,
) -> ImageTable:
    """All images, of `shape` (channels, height, width).

    `ignores_classes` reads the images of a folder and of its subfolders alike, or one image file; `label` is
    null then. Raises `DataError` with every problem and its file. With `problems`, those of single images go
    there instead, unless no image is good: so a caller can tell them together with its own.
    """
    if config.source is not None:
        return _digits(config, shape)
    assert config.path is not None
    found_problems = Problems(config.path) if problems is None else problems
    images, entries = [], []
    try:
        found_entries, notes = _entries(config, config.path, ignores_classes=ignores_classes)
        for number, entry in enumerate(found_entries):
            if config.max_rows is not None and number >= config.max_rows:
                break
            found = decode(entry.data, shape) if entry.data or not entry.problems else ""
            of_image = [found] if isinstance(found, str) and found else []
            for problem in (*entry.problems, *of_image):
                found_problems.add(entry.where, problem)
            if not isinstance(found, str) and not entry.problems:
                images.append(found)
                entries.append(entry)
    except OSError as error:
        raise read_error(config.path, error) from error
    if problems is None or not images:
        found_problems.raise_if_any()
    if not images:
        raise DataError(f"{config.path} has no images: put some there, or set another data.path.")
    return ImageTable(
        images=np.stack(images),
        places=[entry.where for entry in entries],
        labels=[] if config.label is None else [entry.label for entry in entries],
        texts=[] if config.text is None else [entry.text for entry in entries],
        notes=notes,
    )


def _entries(
    config: ImagesConfig, path: str, *, ignores_classes: bool
) -> tuple[Iterator[_Entry], tuple[str, ...]]:
    """The images, and notes on what is not used of the data."""
    if config.is_parquet:
        if not storage.exists(path):
            raise DataError(f"{path} does not exist: name a folder of images, or a .parquet file.")
        columns = [name for name in (config.label, config.text) if name is not None]
        classes = named_classes(parquet_metadata(path), columns) if columns else NamedClasses()
        return _parquet_entries(config, path, classes), classes.notes
    folder = storage.local_path(path)
    if folder is None:
        raise DataError(f"{path}: a folder of images must be on this machine; a .parquet file need not.")
    if not folder.exists():
        raise DataError(f"{path} does not exist: name a folder of images, or a .parquet file.")
    if ignores_classes:
        return _all_files(folder), ()
    if not folder.is_dir():
        raise DataError(f"{path} is no folder of images, and its name does not end in .parquet.")
    return _folder_entries(folder, labelled=config.label is not None), ()


def _all_files(path: Path) -> Iterator[_Entry]:
    """The image of a file, or all of a folder and of its subfolders, by name."""
    if not path.is_dir():
        yield _file_entry(path, "")
        return
    for child in _visible(path):
        if child.is_dir():
            yield from _files(child, child.name)
        else:
            yield _file_entry(child, "")


def _folder_entries(folder: Path, *, labelled: bool) -> Iterator[_Entry]:
    """The images of a folder, class by class and file by file in the order of their names."""
    if not labelled:
        yield from _files(folder, "")
        return
    for child in _visible(folder):
        if not child.is_dir():
            problem = (
                "a folder of images has a subfolder for each class, and this file is in none: move it, or "
                "set label=null for images without classes."
            )
            yield _Entry(_shown(child), b"", problems=(problem,))
            continue
        if not _is_utf_8(child.name):  # a checkpoint could not name the class
            problem = "the name of this class is not UTF-8: rename the folder."
            yield _Entry(_shown(child), b"", problems=(problem,))
            continue
        if not any(_visible(child)):
            problem = "the folder of this class has no images: add some, or remove it."
            yield _Entry(_shown(child), b"", problems=(problem,))
        yield from _files(child, child.name)


def _files(folder: Path, label: str) -> Iterator[_Entry]:
    for file in _visible(folder):
        yield _file_entry(file, label)


def _file_entry(file: Path, label: str) -> _Entry:
    problem = None
    if not file.is_file():
        problem = _no_file_problem(file, has_classes=bool(label))
    elif file.suffix.lower() not in DECODED_SUFFIXES:
        known = ", ".join(DECODED_SUFFIXES)
        problem = f"is no image by its name, which must end in {known}. Remove or convert it."
    elif file.stat().st_size > MAX_ROW_BYTES:
        problem = f"has more than {MAX_ROW_BYTES:,} bytes. Remove or convert it."
    if problem is not None:
        return _Entry(_shown(file), b"", problems=(problem,))
    return _Entry(_shown(file), file.read_bytes(), label, label)


def _no_file_problem(path: Path, *, has_classes: bool) -> str:
    if path.is_symlink() and not path.exists():
        return "is a link to nothing: remove it."
    if path.is_dir() and not has_classes:
        return (
            "is a folder, and label=null reads the images beside it alone: give the folder of these images, "
            "or leave label out, so that each folder is a class."
        )
    return "is no image file but a folder, pipe or device: move or remove it."


def _is_utf_8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: Path) -> str:
    """A path in messages, in which its characters cannot control a terminal."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, by name, without hidden files such as .DS_Store."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _parquet_entries(config: ImagesConfig, path: str, classes: NamedClasses) -> Iterator[_Entry]:
    columns = dict.fromkeys(name for name in (config.image, config.label, config.text) if name is not None)
    for number, row in enumerate(parquet_rows(path, list(columns)), start=1):
        yield _parquet_entry(config, row, f"{path}:{number}", classes)


def _parquet_entry(config: ImagesConfig, row: dict[str, Any], where: str, classes: NamedClasses) -> _Entry:
    data, problems = _image_bytes(row[config.image]), []
    if isinstance(data, str):
        problems.append(f"{config.image!r} {data}")
        data = b""
    found = {config.label: "", config.text: ""}
    for column in dict.fromkeys(name for name in (config.label, config.text) if name is not None):
        try:
            found[column] = _text_of(classes.label(column, row[column]), is_label=column == config.label)
        except ValueError as error:
            problems.append(f"{column!r} {error}")
    return _Entry(where, data, found[config.label], found[config.text], tuple(problems))


def _text_of(value: object, *, is_label: bool) -> str:
    """Raises `ValueError` for what is no text; a label may be a whole number."""
    if is_label and (value is None or (isinstance(value, str) and not value.strip())):
        raise ValueError(
            f"is {'null' if value is None else 'empty'}: every image needs a label. Label it, remove it, or "
            "set label=null for all."
        )
    if is_label and isinstance(value, int):
        return str(value)
    if problem := text_problem(value, "a string or a whole number" if is_label else "a string"):
        raise ValueError(problem)
    return str(value)


def _image_bytes(value: object) -> bytes | str:
    """The bytes of an image file in a column, as Hugging Face's data sets have them too, or a problem."""
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value
    return f"is {'null' if value is None else type(value).__name__}, and must be the bytes of an image file."


def _digits(config: ImagesConfig, shape: tuple[int, int, int]) -> ImageTable:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            f"data.source={config.source} needs scikit-learn, which is not installed: pip install "
            "distft[images]."
        ) from None
    if shape != _DIGIT_SHAPE:
        raise DataError(
            f"{config.name}: its images have the shape {list(_DIGIT_SHAPE)} (channels, height, width), and "
            f"the model reads {list(shape)}: set model.num_channels=1 and model.image_size=8."
        )
    found = load_digits()
    is_held_out = np.arange(len(found.target)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    rows = np.flatnonzero(is_held_out == (config.source == "digits_held_out"))[: config.max_rows]
    # Pixels are whole numbers from 0 to 16.
    images = np.round(found.images[rows] * (255 / 16)).astype(np.uint8)[:, None]
    names = [DIGIT_NAMES[digit] for digit in found.target[rows].tolist()]
    return ImageTable(
        images=images,
        places=[f"{config.name}, image {row}" for row in rows.tolist()],
        labels=[] if config.label is None else names,
        texts=[] if config.text is None else names,
    )
