import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data.batch import RaggedArray
from distft.data.dataset import DataContext
from distft.data.labelled import LabelledConfig
from distft.data.labelled_rows import LabelledRows, LabelNames, truncate_pair
from distft.data.targets import IGNORE_INDEX, LABEL
from distft.errors import DataError

CONTEXT = DataContext(
    seq_len=8,
    vocab_size=200,
    encode=lambda text: [ord(letter) for letter in text.strip()],
    tokenizer_fingerprint="letters",
)
ROWS = [("how far", "NUM"), ("who", "HUM"), ("what is an atom", "DESC"), ("when", "NUM")]


def write(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return str(path)


def text_of(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.tolist()))


def test_texts_and_labels_are_encoded_and_long_texts_truncated_at_the_end(tmp_path: Path) -> None:
    feed = LabelledConfig(path=write(tmp_path / "a.jsonl", ROWS)).build_for_evaluation(CONTEXT)
    batch = feed.batch(0, 4)
    assert feed.label_names == ("DESC", "HUM", "NUM")
    assert batch.targets[LABEL].tolist() == [2, 1, 0, 2]
    assert batch.num_targets[LABEL] == 4
    assert batch.lengths.tolist() == [7, 3, 8, 4]
    found = [text_of(ids[:n]) for ids, n in zip(batch.input_ids, batch.lengths, strict=True)]
    assert found == ["how far", "who", "what is ", "when"]
    assert "4 rows, 3 labels, 1 cut to seq_len=8" in feed.summary


def test_evaluation_uses_the_label_ids_of_training(tmp_path: Path) -> None:
    train = LabelledConfig(path=write(tmp_path / "a.jsonl", ROWS)).build(CONTEXT)
    names = replace(CONTEXT, label_names=train.label_names)
    validation = LabelledConfig(path=write(tmp_path / "b.jsonl", [("when", "NUM"), ("who", "HUM")]))
    assert validation.build_for_evaluation(names).batch(0, 2).targets[LABEL].tolist() == [2, 1]


def test_one_error_names_file_and_line_of_every_unusable_label_and_text(tmp_path: Path) -> None:
    rows = [("when", "NUM"), ("who", "HUMAN"), (" ", "NUM"), ("where", "LOC"), ("whom", "HUMAN")]
    path = write(tmp_path / "b.jsonl", rows)
    with pytest.raises(DataError) as raised:
        LabelledConfig(path=path).build(replace(CONTEXT, label_names=("HUM", "NUM")))
    lines = str(raised.value).splitlines()
    assert lines[0].startswith(f"{path}:2: label 'HUMAN' is not one of the 2")
    assert "Did you mean 'HUM'?" in lines[0]
    assert lines[1].startswith(f"{path}:4: label 'LOC'")
    assert lines[2] == f"{path}:3: 'text' encodes to no tokens."
    assert len(lines) == 3


def test_data_with_a_single_label_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only one label, 'NUM'"):
        LabelledConfig(path=write(tmp_path / "a.jsonl", [("when", "NUM")] * 2)).build(CONTEXT)


def test_a_token_outside_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"token id 119.*vocab_size=120"):
        LabelledConfig(path=write(tmp_path / "a.jsonl", ROWS)).build(replace(CONTEXT, vocab_size=119))


@given(labels=st.lists(st.text(max_size=3), min_size=1))
def test_label_names_are_the_distinct_labels_sorted(labels: list[str]) -> None:
    names = LabelNames.from_labels(labels).names
    assert set(names) == set(labels)
    assert len(set(names)) == len(names)
    assert LabelNames.from_labels(reversed(labels)).names == names


def test_integer_labels_are_sorted_as_integers() -> None:
    assert LabelNames.from_labels(["10", "9", "-1"]).names == ("-1", "9", "10")


@given(
    rows=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=8),
    pad_id=st.integers(0, 5),
    data=st.data(),
)
@settings(deadline=None)
def test_batches_are_padded_on_the_right_to_their_longest_row(
    rows: list[list[int]], pad_id: int, data: st.DataObject
) -> None:
    dataset = LabelledRows(RaggedArray(rows), np.arange(len(rows)), pad_id=pad_id)
    indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    batch = dataset.batch(np.array(indices))
    width = max(len(rows[i]) for i in indices)
    assert batch.input_ids.tolist() == [rows[i] + [pad_id] * (width - len(rows[i])) for i in indices]
    assert batch.lengths.tolist() == [len(rows[i]) for i in indices]
    assert batch.targets[LABEL].tolist() == indices


def test_a_batch_without_rows_is_one_row_without_targets() -> None:
    batch = LabelledRows(RaggedArray([[5, 6]]), np.array([0])).batch(np.array([], np.int64))
    assert batch.input_ids.tolist() == [[5, 6]]
    assert batch.targets[LABEL].tolist() == [IGNORE_INDEX]
    assert batch.num_targets[LABEL] == 0


@given(first=st.lists(st.integers()), second=st.lists(st.integers()), max_tokens=st.integers(0, 20))
def test_truncate_pair_shortens_the_longer_text_first(
    first: list[int], second: list[int], max_tokens: int
) -> None:
    kept_first, kept_second = truncate_pair(first, second, max_tokens)
    assert kept_first == first[: len(kept_first)]
    assert kept_second == second[: len(kept_second)]
    assert len(kept_first) + len(kept_second) == min(max_tokens, len(first) + len(second))
    if len(kept_first) < len(first):
        assert len(kept_first) >= len(kept_second)
    if len(kept_second) < len(second):
        assert len(kept_second) >= len(kept_first) - 1


@pytest.mark.parametrize(("eos_id", "separator"), [(7, "\x07"), (None, "")])
def test_a_text_pair_is_joined_by_a_separator(tmp_path: Path, eos_id: int | None, separator: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("a,b,same\nabc,xyz,yes\nabcdefghij,x,no\n")
    config = LabelledConfig(path=str(path), text="a", text_pair="b", label="same")
    batch = config.build_for_evaluation(replace(CONTEXT, eos_id=eos_id)).batch(0, 2)
    assert text_of(batch.input_ids[0, : batch.lengths[0]]) == f"abc{separator}xyz"
    longest = "abcdefg"[: 7 - len(separator)]
    assert text_of(batch.input_ids[1, : batch.lengths[1]]) == f"{longest}{separator}x"


def test_each_training_epoch_is_another_permutation_of_the_rows(tmp_path: Path) -> None:
    rows = [(chr(65 + i), "ab"[i % 2]) for i in range(50)]
    feed = LabelledConfig(path=write(tmp_path / "a.jsonl", rows)).build(CONTEXT)
    epochs = [feed.batch(50 * i, 50 * i + 50).input_ids[:, 0].tolist() for i in range(3)]
    assert all(sorted(epoch) == list(range(65, 115)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("column", ["text", "label"])
def test_half_a_character_is_told_with_file_and_line(tmp_path: Path, column: str) -> None:
    row = {"text": "who", "label": "HUM"} | {column: "late \ud83d"}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ({"text": "how", "label": "NUM"}, row)))
    with pytest.raises(DataError, match=rf"a\.jsonl:2: '{column}' has a lone surrogate"):
        LabelledConfig(path=str(path)).build(CONTEXT)


def test_the_summary_describes_labels_lengths_and_what_is_cut(tmp_path: Path) -> None:
    rows = [("a" * n, label) for n, label in zip([1, 2, 3, 4, 20], "xyxxz", strict=True)]
    path = write(tmp_path / "a.jsonl", rows)
    assert LabelledConfig(path=path).build(CONTEXT).summary.splitlines() == [
        f"{path}: 5 rows, 3 labels, 1 cut to seq_len=8",
        f"{path}: labels: 'x' 3, 'y' 1, 'z' 1",
        f"{path}: tokens of a text: median 3, 95 % at most 20, longest 20",
        f"{path}: once only: the labels 'y', 'z'",
    ]


def test_many_labels_are_shown_in_short(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("a", str(i % 30)) for i in range(75)])
    (line,) = [
        line for line in LabelledConfig(path=path).build(CONTEXT).summary.splitlines() if ": labels" in line
    ]
    assert line.count(",") == 20
    assert line.endswith("and 10 more with 2 to 2")
