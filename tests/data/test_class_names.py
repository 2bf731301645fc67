"""Names of classes in the metadata of Parquet files: used where they hold, and told where they do not."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from support.token_rows import data_context

from distft.config import parse
from distft.data.class_names import named_classes
from distft.data.feed import Feed
from distft.data.images import ImagesConfig
from distft.errors import DataError

SHAPE = (1, 2, 2)


def _metadata(names: Any, *, kind: str = "ClassLabel", column: str = "label") -> dict[bytes, bytes]:
    """As `datasets` writes it."""
    features = {"image": {"_type": "Image"}, column: {"names": names, "_type": kind}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def _file(folder: Path, metadata: dict[bytes, bytes], labels: list[Any], **columns: list[Any]) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros(SHAPE[1:], np.uint8)).save(buffer, "PNG")
    images = [{"bytes": buffer.getvalue(), "path": None}] * len(labels)
    table = pyarrow.table({"image": images, "label": labels, **columns})
    path = folder / "images.parquet"
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def _read(path: Path, **settings: Any) -> Feed:
    config: ImagesConfig = parse(ImagesConfig, {"path": str(path), **settings}, where="data")
    reads = {"reads_tokens": "text" in settings, "encode": lambda text: [len(text)]}
    return config.build_for_evaluation(data_context(6, image_shape=SHAPE, **reads))


def test_whole_numbers_get_the_names_that_hugging_face_wrote(tmp_path: Path) -> None:
    path = _file(tmp_path, _metadata(["cat", "dog", "ape"]), [2, 0, 2, 1])
    feed = _read(path)
    assert feed.label_names == ("ape", "cat", "dog")
    assert feed.batch(0, 4).targets["label"].tolist() == [0, 1, 0, 2]
    assert _read(path, text="label").batch(0, 4).is_captioned
    captions = _metadata(["a", "bb"], column="caption")
    captioned = _file(tmp_path, captions, [2, 0], caption=[1, 0])
    found = _read(captioned, label=None, text="caption").batch(0, 2)
    assert found.input_ids.tolist() == [[2], [1]]


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {b"pandas": b"{}"},
        _metadata(["cat", "dog"], kind="Value"),
        _metadata(["cat", "dog"], column="other"),
        {b"huggingface": b"[]"},
        {b"huggingface": b'{"info": {"features": {"label": ["cat"]}}}'},
    ],
)
def test_without_names_labels_keep_their_numbers(tmp_path: Path, metadata: dict[bytes, bytes]) -> None:
    feed = _read(_file(tmp_path, metadata, [1, 0]))
    assert feed.label_names == ("0", "1")
    assert "metadata" not in feed.summary


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({b"huggingface": b"{"}, "the metadata is no JSON"),
        ({b"huggingface": b"[" * 100_000}, "the metadata is no JSON"),
        ({b"huggingface": b"\xff"}, "the metadata is no JSON"),
        (_metadata([]), "of 'label' in the metadata are not used: they are no list of names"),
        (_metadata({"0": "cat"}), "they are no list of names"),
        (_metadata(["cat", 1]), "one of them is no text, or empty"),
        (_metadata(["cat", " "]), "one of them is no text, or empty"),
        (_metadata(["cat", "\ud800"]), "one of them is no text, or empty"),
        (_metadata(["cat", "cat"]), "two of them are equal"),
        (_metadata([str(i) for i in range(70_000)]), "they are 70,000, and at most 65,536 are read"),
    ],
)
def test_malformed_names_are_told_and_not_used(
    tmp_path: Path, metadata: dict[bytes, bytes], problem: str
) -> None:
    feed = _read(_file(tmp_path, metadata, [1, 0]))
    assert feed.label_names == ("0", "1")
    assert problem in feed.summary


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        (
            -1,
            r"parquet:2: 'label' is -1 \(-1: Hugging Face's unlabelled rows\), and the file's metadata",
        ),
        (2, "'label' is 2, and the file's metadata names the classes 0 to 1: label the row"),
    ],
)
def test_a_number_without_a_name_is_refused_with_its_row(tmp_path: Path, label: int, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        _read(_file(tmp_path, _metadata(["cat", "dog"]), [0, label, 1]))


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["info", "features", "label"]), inner),
)


@given(
    metadata=_JSON
    | st.builds(
        lambda names: json.loads(_metadata(names)[b"huggingface"]), st.lists(st.text() | st.integers())
    )
)
def test_any_metadata_gives_distinct_names_or_none(metadata: Any) -> None:
    found = named_classes({b"huggingface": json.dumps(metadata).encode()}, ["label"])
    names = found.names.get("label", ())
    assert len(set(names)) == len(names)
    for number, name in enumerate(names):
        assert found.label("label", number) == name
        assert name.strip()
