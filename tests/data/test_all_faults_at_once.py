"""Rows that cannot be read and rows that cannot be used are told together, each with its line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from distft.data.completion import CompletionConfig
from distft.data.dataset import DataContext
from distft.data.images import ImagesConfig
from distft.data.labelled import LabelledConfig
from distft.data.pairs import PairsConfig
from distft.data.preferences import PreferencesConfig
from distft.data.token_labels import TokenLabelsConfig
from distft.errors import DataError


class Chat:
    """Refuses the text `worse`."""

    fingerprint = "letters"

    def completion(
        self, prompt: list[dict[str, Any]], completion: list[dict[str, Any]]
    ) -> tuple[list[int], list[int]]:
        if any(message["content"] == "worse" for message in (*prompt, *completion)):
            raise DataError("the chat template refuses it")
        return [1], [ord(letter) for message in completion for letter in message["content"]]


CONTEXT = DataContext(
    seq_len=20,
    vocab_size=200,
    encode=lambda text: [ord(letter) for letter in text.strip() if letter != "\x01"],
    tokenizer_fingerprint="letters",
    chat=Chat,  # type: ignore[arg-type]
    eos_id=1,
    pad_id=3,
)


def said(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in messages]


ASKED = ("user", "a")
# Of each kind of data its settings, rows, and of each row how its problems begin.
KINDS: dict[str, tuple[Callable[[str], Any], list[tuple[dict[str, Any], list[str]]]]] = {
    "preferences": (
        lambda path: PreferencesConfig(path=path),
        [
            ({"prompt": "a", "chosen": "b", "rejected": "b"}, ["'chosen' and 'rejected' are equal"]),
            (
                {"prompt": 1, "chosen": None, "rejected": "b"},
                ["'prompt' is 1, but", "'chosen' is null, but"],
            ),
            ({"prompt": "a"}, ["has no column 'chosen'", "has no column 'rejected'"]),
            ({"prompt": "", "chosen": "", "rejected": "b"}, ["'prompt' is empty", "'chosen' is empty"]),
        ],
    ),
    "preferences of messages": (
        lambda path: PreferencesConfig(path=path, format="messages", prompt=None),
        [
            (dict.fromkeys(("chosen", "rejected"), said(ASKED, ("assistant", "b"))), ["'chosen' and 'reje"]),
            (
                {"chosen": said(("user", 1), ("bot", 2)), "rejected": "b"},
                [
                    "message 1 of 'chosen' has content that is 1",
                    "message 2 of 'chosen' has role \"bot\"",
                    "message 2 of 'chosen' has content that is 2",
                    "'rejected' must be an array of messages",
                ],
            ),
            (
                {
                    "chosen": said(("user", "worse"), ("assistant", "b")),
                    "rejected": said(("user", "worse"), ("assistant", "c")),
                },
                ["the chat template refuses it"],
            ),
            (
                {"chosen": said(ASKED, ("user", "b")), "rejected": said(ASKED, ("system", "b"))},
                ["'chosen' must go on behind the prompt", "'rejected' must go on behind the prompt"],
            ),
        ],
    ),
    "completions": (
        lambda path: CompletionConfig(path=path),
        [
            ({"prompt": 1, "completion": None}, ["'prompt' is 1", "'completion' is null"]),
            ({"prompt": " ", "completion": ""}, ["'prompt' encodes to no", "'completion' encodes to no"]),
        ],
    ),
    "labels": (
        lambda path: LabelledConfig(path=path),
        [
            ({"text": "", "label": "x"}, ["'text' encodes to no tokens"]),
            ({"text": 1, "label": None}, ["'text' is 1", "'label' is null"]),
            ({"text": "b", "label": "x"}, []),  # the only label is told when all rows are good
        ],
    ),
    "several labels": (
        lambda path: LabelledConfig(path=path, labels="several"),
        [
            ({"text": "", "label": ["x"]}, ["'text' encodes to no tokens"]),
            ({"text": 1, "label": ["x", None, 2.5]}, ["'text' is 1", "'label' is null", "'label' is 2.5"]),
        ],
    ),
    "numbers": (
        lambda path: LabelledConfig(path=path, labels="number"),
        [
            ({"text": "", "label": 1e300}, ["'label' is 1e+300, which float32", "'text' encodes to no"]),
            ({"text": 1, "label": "x"}, ["'text' is 1", "'label' is \"x\", but must be a finite number"]),
        ],
    ),
    "pairs": (
        lambda path: PairsConfig(path=path, score="s"),
        [
            ({"text": "", "positive": "a", "s": 1}, ["'text' encodes to no tokens"]),
            ({"text": "a", "positive": 2, "s": "x"}, ["'positive' is 2", "'s' is \"x\""]),
        ],
    ),
    "token labels": (
        lambda path: TokenLabelsConfig(path=path),
        [
            (
                {"tokens": ["a", 1, ""], "labels": [2]},
                ["'tokens': entry 2 is 1", "'tokens': entry 3 is empty", "'labels': entry 1 is 2"],
            ),
            ({"tokens": ["a"], "labels": ["x", "y"]}, ["1 'tokens' and 2 'labels'"]),
            ({"tokens": ["\x01"], "labels": ["x"]}, ["its word 1, '\\x01', encodes to no tokens"]),
        ],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_faults_of_a_file_are_told_at_once(kind: str, tmp_path: Path) -> None:
    config, rows = KINDS[kind]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in rows))
    with pytest.raises(DataError) as caught:
        config(str(path)).build(CONTEXT)
    expected = [f"{path}:{line}: {start}" for line, (_, own) in enumerate(rows, start=1) for start in own]
    found = str(caught.value).splitlines()
    assert len(found) == len(expected), found
    for message, start in zip(found, expected, strict=True):
        assert message.startswith(start)


def test_all_faults_of_images_are_told_at_once(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "a.png")
    good, path = (tmp_path / "a.png").read_bytes(), str(tmp_path / "a.parquet")
    rows = [
        {"image": b"no image", "label": None, "text": "a"},
        {"image": good, "label": "x", "text": " "},
        {"image": None, "label": "x", "text": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    context = replace(CONTEXT, image_shape=(1, 4, 4), reads_tokens=True)
    with pytest.raises(DataError) as caught:
        ImagesConfig(path=path, text="text").build(context)
    expected = [
        ":1: 'label' is null",
        ":1: is no image",
        ":2: its text ' ' encodes to no tokens",
        ":3: 'image' is null",
        ":3: 'text' is null",
    ]
    found = str(caught.value).splitlines()
    assert len(found) == len(expected), found
    for start in expected:
        assert any(message.startswith(f"{path}{start}") for message in found), (start, found)


def test_each_line_of_an_unknown_label_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in "xyzy"))
    with pytest.raises(DataError) as caught:
        LabelledConfig(path=str(path)).build(replace(CONTEXT, label_names=("x", "w")))
    assert [line.partition("label ")[2][:3] for line in str(caught.value).splitlines()] == ["'y'", "'z'"]
    assert "(Lines 4 too.)" in str(caught.value)


def test_a_file_that_has_no_column_of_several_is_told_of_all(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("words,class\na,b\n")
    with pytest.raises(DataError) as caught:
        LabelledConfig(path=str(path)).build(CONTEXT)
    assert [line.partition(";")[0] for line in str(caught.value).splitlines()] == [
        f"{path}:1: has no column 'text'",
        f"{path}:1: has no column 'label'",
    ]
