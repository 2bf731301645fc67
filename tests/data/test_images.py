"""Images of folders, Parquet and scikit-learn: what is read, how it is augmented, and what is refused."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.token_rows import data_context

from distft.config import parse
from distft.data.dataset import DataContext
from distft.data.image_decoding import decode
from distft.data.image_rows import Augmentation
from distft.data.images import ImagesConfig
from distft.data.targets import LABEL, ROW
from distft.errors import ConfigError, DataError

RGB = (3, 5, 4)  # channels, height, width


def pixels_of(seed: int, shape: tuple[int, int, int] = RGB) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def file_of(pixels: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    image.save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def context(shape: tuple[int, int, int] | None = RGB, **changes: Any) -> DataContext:
    return data_context(6, image_shape=shape, **{"reads_tokens": False, **changes})


def config_of(**raw: Any) -> ImagesConfig:
    config: ImagesConfig = parse(ImagesConfig, raw, where="data")
    return config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three cats and two dogs; image i has `pixels_of(i)`."""
    for number, name in enumerate(["cat/a.png", "cat/b.bmp", "cat/c.webp", "dog/a.png", "dog/b.ppm"]):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            file_of(pixels_of(number), {"ppm": "PPM", "bmp": "BMP", "webp": "WEBP"}.get(name[6:], "PNG"))
        )
    (tmp_path / "images" / "cat" / ".DS_Store").write_bytes(b"not an image")
    return tmp_path / "images"


def test_a_folder_has_a_class_in_each_subfolder(folder: Path) -> None:
    feed = config_of(path=str(folder)).build_for_evaluation(context())
    assert feed.label_names == ("cat", "dog")
    batch = feed.batch(0, 5)
    assert batch.images is not None
    assert np.array_equal(batch.images.numpy(), np.stack([pixels_of(i) for i in range(5)]))
    assert batch.targets[LABEL].tolist() == [0, 0, 0, 1, 1]
    assert (batch.num_tokens, batch.num_attention_pairs) == (5, 5)
    assert "5 RGB images of 4 x 5 pixels, 300 bytes" in feed.summary
    assert "'cat' 3, 'dog' 2" in feed.summary


@pytest.mark.parametrize("label", ["label", "kind"])
def test_a_parquet_file_has_the_same(tmp_path: Path, label: str) -> None:
    path = tmp_path / "images.parquet"
    files = [file_of(pixels_of(i)) for i in range(3)]
    nested = label == "kind"  # as Hugging Face writes them
    column: list[Any] = [{"bytes": data, "path": None} for data in files] if nested else files
    table = pyarrow.table({"image": column, label: [7, 3, 7], "caption": ["a", "bb", "ccc"]})
    pyarrow.parquet.write_table(table, path)
    feed = config_of(path=str(path), label=label).build_for_evaluation(context())
    assert feed.label_names == ("3", "7")
    assert feed.batch(0, 3).targets[LABEL].tolist() == [1, 0, 1]
    captioned = config_of(path=str(path), label=None, text="caption")
    batch = captioned.build(context(reads_tokens=True, encode=lambda text: [len(text)])).batch(0, 3)
    assert batch.is_captioned
    assert batch.views_per_sequence == 2
    assert set(batch.targets) == {ROW}


def test_the_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    parts = {}
    for source in ("digits", "digits_held_out"):
        feed = config_of(source=source).build_for_evaluation(context((1, 8, 8)))
        parts[source] = feed.batch(0, feed.num_sequences)
        assert feed.label_names == (
            "eight",
            "five",
            "four",
            "nine",
            "one",
            "seven",
            "six",
            "three",
            "two",
            "zero",
        )
    held_out = parts["digits_held_out"]
    assert held_out.images is not None
    assert np.array_equal(np.round(held_out.images[:, 0].numpy() / (255 / 16)), digits.images[4::5])
    assert len(held_out.images) + len(parts["digits"].input_ids) == len(digits.images)
    with pytest.raises(DataError, match=r"have the shape \[1, 8, 8\].*set model.num_channels=1 and"):
        config_of(source="digits").build(context())


def augmented(seed: int, **changes: Any) -> Any:
    raw = {"source": "digits", "augment": {"shift": 2, "flip": True}, "data_seed": seed, **changes}
    return config_of(**raw).build(context((1, 8, 8)))


@settings(max_examples=15)
@given(start=st.integers(0, 3000), cut=st.integers(1, 7))
def test_augmentation_depends_on_seed_and_sequence_number_alone(start: int, cut: int) -> None:
    feed, stop = augmented(5), start + 8
    whole = feed.batch(start, stop).images
    parts = [feed.batch(start, start + cut).images, feed.batch(start + cut, stop).images]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, augmented(6).batch(start, stop).images)


def test_an_augmented_image_is_a_shifted_and_sometimes_mirrored_one() -> None:
    plain = config_of(source="digits", data_seed=5).build(context((1, 8, 8)))
    found, originals = augmented(5, views=2).batch(0, 100), plain.batch(0, 100).images
    assert found.rows_per_sequence == 2
    moves = []
    for row, image in enumerate(found.images):
        padded = torch.nn.functional.pad(originals[row // 2], (2, 2, 2, 2))
        fitting = [
            (dy, dx, flipped)
            for dy in range(5)
            for dx in range(5)
            for flipped in (False, True)
            if torch.equal(
                (crop.flip(2) if flipped else crop)
                if (crop := padded[:, dy : dy + 8, dx : dx + 8]) is not None
                else image,
                image,
            )
        ]
        assert fitting
        moves.append(fitting[0])
    assert len(set(moves)) > 40  # of 50
    num_flipped = sum(flipped for *_, flipped in moves)
    assert 70 <= num_flipped <= 130
    assert not torch.equal(found.images[::2], found.images[1::2])
    assert torch.equal(found.targets[LABEL][::2], found.targets[LABEL][1::2])


def test_the_empty_batch_has_an_image_and_no_targets() -> None:
    batch = augmented(5, views=2).batch(7, 7)
    assert batch.images.shape == (2, 1, 8, 8)
    assert not any(batch.num_targets.values())


def _overwrite(data: Callable[[], bytes] | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "dog" / "a.png").write_bytes(data if isinstance(data, bytes) else data()) and None
    )


def _png(width: int, height: int, bits: int, pixels: bytes, transparent: bytes = b"") -> bytes:
    """An RGB file that declares this size; `transparent` is its transparent colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


def _bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels, as its header says."""
    return _png(60_000, 60_000, 8, bytes(10**6))


def _rows(bytes_per_pixel: int) -> bytes:
    """The rows of a PNG of 4 x 5 pixels, each after its filter."""
    return bytes(5 * (1 + 4 * bytes_per_pixel))


def test_a_png_of_8_bits_without_transparency_is_read() -> None:
    found = decode(_png(4, 5, 8, _rows(3)), RGB)
    assert not isinstance(found, str)
    assert not found.any()
    of_15 = decode(b"P6\n4 5\n15\n" + bytes([15] * 60), RGB)  # the greatest value is white
    assert not isinstance(of_15, str)
    assert (of_15 == 255).all()


def _palette() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(1).transpose(1, 2, 0)).quantize(4).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            _overwrite(lambda: file_of(pixels_of(1, (3, 6, 9)))),
            "a.png: has 9 x 6 pixels, and the model reads 4 x 5",
        ),
        (_overwrite(lambda: file_of(pixels_of(1, (1, 5, 4)))), "a.png: is grey, and the model reads RGB"),
        (_overwrite(_palette), "is of a palette, and the model reads RGB (model.num_channels=3): convert it"),
        (_overwrite(lambda: _png(4, 5, 16, _rows(6))), "a.png: has 16 bits a channel, and images have 8"),
        (_overwrite(b"P6\n4 5\n65535\n" + bytes(120)), "a.png: has 16 bits a channel, and images have 8"),
        (
            _overwrite(lambda: _png(4, 5, 8, _rows(3), struct.pack(">HHH", 1, 2, 3))),
            "a.png: has a transparent colour, and images are opaque: put it on a background",
        ),
        (_overwrite(lambda: file_of(pixels_of(1))[:60]), "a.png: is damaged:"),
        (_overwrite(b"GIF89a not an image"), "a.png: is no image of a kind that is read (PNG, JPEG,"),
        (_overwrite(b""), "a.png: is no image of a kind that is read"),
        (_overwrite(_bomb), "declares far more pixels than the model's 4 x 5"),
        (lambda f: (f / "eel").mkdir(), "eel: the folder of this class has no images"),
        (
            lambda f: (f / "a.png").write_bytes(b"") and None,
            "a.png: a folder of images has a subfolder for each",
        ),
        (lambda f: (f / "dog" / "notes.txt").write_text("x") and None, "notes.txt: is no image by its name"),
        (lambda f: (f / "dog" / "old").mkdir(), "old: is no image file but a folder"),
        (
            lambda f: (f / "dog" / "x.png").symlink_to(f / "gone.png"),
            "x.png: is a link to nothing: remove it",
        ),
        (lambda f: Path(os.fsdecode(bytes(f) + b"/\xff")).mkdir(), "the name of this class is not UTF-8"),
    ],
)
def test_what_cannot_be_an_image_of_a_class_is_named_with_its_file(
    folder: Path, damage: Callable[[Path], None], problem: str
) -> None:
    damage(folder)
    (folder / "cat" / "b.bmp").write_bytes(b"also damaged")  # all faults at once
    with pytest.raises(DataError) as error:
        config_of(path=str(folder)).build(context())
    assert problem in str(error.value)
    assert str(folder) in str(error.value)
    assert "b.bmp" in str(error.value)


def test_many_faults_are_counted(folder: Path) -> None:
    for number in range(30):
        (folder / "dog" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"\.\.\. and 20 more in .*images\."):
        config_of(path=str(folder)).build(context())


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"image": [None], "label": ["a"]}, ":1: 'image' is null, and must be the bytes of an image file"),
        ({"image": [b"x"], "label": [None]}, ":1: 'label' is null: every image needs a label"),
        ({"image": [b"x"], "label": [" "]}, ":1: 'label' is empty"),
        ({"image": [b"x"], "label": [1.5]}, ":1: 'label' is 1.5, but must be a string or a whole number"),
        ({"image": [b"x"], "label": ["a"]}, ":1: is no image of a kind"),
        ({"picture": [b"x"], "label": ["a"]}, "has no column 'image'"),
        ({"image": [b"x"]}, "has no column 'label'"),
        ({"image": [], "label": []}, "has no images"),
    ],
)
def test_what_parquet_lacks_is_named_with_file_and_row(
    tmp_path: Path, columns: dict[str, list[Any]], problem: str
) -> None:
    path = tmp_path / "images.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(DataError) as error:
        config_of(path=str(path)).build(context())
    assert problem in str(error.value)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nowhere", "does not exist: name a folder of images, or a .parquet file"),
        ("nowhere.parquet", "does not exist: name a folder"),
        ("images/cat/a.png", "is no folder of images, and its name does not end in .parquet"),
        ("images/dog/broken.parquet", "is damaged, or no Parquet file that can be read"),
    ],
)
def test_other_paths_are_refused(folder: Path, name: str, problem: str) -> None:
    (folder / "dog" / "broken.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(DataError, match=problem.replace(".", r"\.")):
        config_of(path=str(folder.parent / name)).build(context())


def test_a_class_that_the_model_was_not_trained_on_is_named_with_its_file(folder: Path) -> None:
    with pytest.raises(DataError, match=r"dog/a\.png: label 'dog' is not one of the 2.*Did you mean 'dogs'"):
        config_of(path=str(folder)).build(context(label_names=("cat", "dogs")))


def test_one_class_or_one_text_alone_teaches_nothing(folder: Path) -> None:
    for file in (folder / "dog").iterdir():
        file.unlink()
    (folder / "dog").rmdir()
    with pytest.raises(DataError, match="only one class, 'cat', of 3 images"):
        config_of(path=str(folder)).build(context())
    with pytest.raises(DataError, match=r"all 3 texts are equal|only one class"):
        config_of(path=str(folder), text="label").build(
            context(reads_tokens=True, encode=lambda text: [len(text)])
        )


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        ({}, "set either path"),
        ({"path": "a", "source": "digits"}, "path=a and source=digits are both set: unset one"),
        ({"path": "a", "views": 2}, "views=2 of an image would be equal"),
        ({"path": "a", "views": 2, "augment": {"flip": True}, "text": "label"}, "are a pair already"),
        ({"path": "a", "text": "caption"}, "text=caption is a column of a .parquet file"),
        ({"path": "a", "text": "label", "label": None}, "text=label needs the classes"),
        ({"path": "a", "augment": {"shift": -1}}, "augment.shift"),
    ],
)
def test_settings_that_make_no_sense_are_refused(raw: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(**raw)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("raw", "changes", "problem"),
    [
        ({"source": "digits"}, {"shape": None}, "the model reads no images: set model.type to vit"),
        (
            {"source": "digits"},
            {"reads_tokens": True},
            "model.type=clip reads an image with its text: set text",
        ),
        ({"source": "digits", "text": "label"}, {}, "the model reads images alone: leave text out"),
        (
            {"source": "digits", "augment": {"shift": 8}},
            {"shape": (1, 8, 8)},
            "data.augment.shift=8 of images of 8 pixels would leave nothing of some: lower it, such as to 1.",
        ),
    ],
)
def test_images_fit_what_the_model_reads(raw: dict[str, Any], changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_of(**raw).build(context(**changes))
    assert problem in str(error.value)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "BMP", "PPM", "WEBP"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    kept=st.floats(0, 1),
)
def test_a_file_of_any_bytes_is_an_image_of_the_shape_or_a_problem(
    kind: str, changes: list[tuple[float, int]], kept: float
) -> None:
    data = bytearray(file_of(pixels_of(1), kind))
    for place, value in changes:
        data[int(place * len(data))] = value
    found = decode(bytes(data[: int(kept * len(data)) + 1]), RGB)
    assert isinstance(found, str) or (found.shape, found.dtype) == (RGB, np.uint8)


def test_augmentation_needs_no_image_larger_than_its_shift() -> None:
    from distft.data.batch import Batch

    batch = Batch(
        input_ids=torch.zeros(3, 1, dtype=torch.int64),
        images=torch.full((3, 1, 1, 1), 9, dtype=torch.uint8),
        targets={},
        num_targets={},
        sequence_numbers=torch.arange(3),
    )
    changed = Augmentation(shift=4, flips=False, seed=1)(batch)
    assert changed.images is not None
    assert set(changed.images.flatten().tolist()) <= {0, 9}
