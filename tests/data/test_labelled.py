import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data.batch import RaggedArray
from distft.data.dataset import DataContext
from distft.data.labelled import LabelledConfig
from distft.data.labelled_rows import LabelledRows, LabelNames, truncate_pair
from distft.data.records import read_records
from distft.data.targets import IGNORE_INDEX, LABEL, LABELS, NUMBER, ROW
from distft.errors import ConfigError, DataError

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


def test_rows_of_a_parquet_file_are_as_those_of_jsonl(tmp_path: Path) -> None:
    """Whole numbers are classes; names of the classes, in the file's metadata, take their place."""
    texts, numbers = ["a b", "c", "d e f"], [1, 0, 1]
    table = pa.table({"text": texts, "label": numbers})
    pq.write_table(table, tmp_path / "numbers.parquet")
    write_jsonl = "".join(
        json.dumps({"text": t, "label": n}) + "\n" for t, n in zip(texts, numbers, strict=True)
    )
    (tmp_path / "numbers.jsonl").write_text(write_jsonl)
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "names.parquet")
    records = {
        name: read_records(str(tmp_path / name), texts=["text"], labels=["label"])
        for name in ("numbers.parquet", "numbers.jsonl", "names.parquet")
    }
    values = [record.values for record in records["numbers.parquet"]]
    assert values == [record.values for record in records["numbers.jsonl"]]
    assert [record.values["label"] for record in records["names.parquet"]] == ["dog", "cat", "dog"]
    with pytest.raises(DataError, match=r"numbers\.parquet has no column 'txt'; did you mean 'text'"):
        read_records(str(tmp_path / "numbers.parquet"), texts=["txt"])
    pq.write_table(pa.table({"text": ["a", None], "label": [0, 1]}), tmp_path / "null.parquet")
    with pytest.raises(DataError, match=r"null\.parquet:2: 'text' is null"):
        read_records(str(tmp_path / "null.parquet"), texts=["text"])
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"damaged\.parquet is damaged"):
        read_records(str(tmp_path / "damaged.parquet"), texts=["text"])


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
    assert lines[0].endswith("(Lines 5 too.)")
    assert lines[1] == f"{path}:3: 'text' encodes to no tokens."
    assert lines[2].startswith(f"{path}:4: label 'LOC'")
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


def write_rows(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_row_may_have_several_classes_or_none(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": ["x", "z"]}, {"text": "b", "label": []}, {"text": "c", "label": "z,y , z"}]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    feed = LabelledConfig(path=path, labels="several").build_for_evaluation(CONTEXT)
    assert feed.label_names == ("x", "y", "z")
    batch = feed.batch(0, 3)
    assert batch.targets[LABELS].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 1]]
    assert batch.num_targets == {LABELS: 3}
    assert f"{path}: labels: 'z' 2, 'x' 1, 'y' 1" in feed.summary.splitlines()


@given(
    rows=st.lists(st.sets(st.sampled_from("abcde")), min_size=1, max_size=12).filter(any),
    as_csv=st.booleans(),
)
@settings(deadline=None)
def test_each_class_of_each_row_is_there(
    tmp_path_factory: pytest.TempPathFactory, rows: list[set[str]], as_csv: bool
) -> None:
    path = tmp_path_factory.mktemp("rows") / ("a.csv" if as_csv else "a.jsonl")
    if as_csv:
        path.write_text(
            "text;label\n".replace(";", ",") + "".join(f"t,{'|'.join(sorted(r))}\n" for r in rows)
        )
    else:
        write_rows(path, *({"text": "t", "label": sorted(row)} for row in rows))
    config = LabelledConfig(path=str(path), labels="several", label_separator="|")
    feed = config.build_for_evaluation(CONTEXT)
    assert feed.label_names is not None
    found = feed.batch(0, len(rows)).targets[LABELS]
    assert [{feed.label_names[k] for k in row.nonzero()[:, 0].tolist()} for row in found] == rows


def test_a_label_may_be_a_number(tmp_path: Path) -> None:
    values = [2.5, -100, "1e3", 0]
    path = write_rows(tmp_path / "a.jsonl", *({"text": "t", "label": value} for value in values))
    feed = LabelledConfig(path=path, labels="number").build_for_evaluation(CONTEXT)
    batch = feed.batch(0, 4)
    assert feed.label_names is None
    assert batch.targets[NUMBER].tolist() == [2.5, -100.0, 1000.0, 0.0]
    assert batch.targets[ROW].tolist() == [0, 0, 0, 0]
    assert "numbers: -100 to 1000, mean 225.6" in feed.summary


def test_rows_without_labels_need_no_label_column(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": "who"}, {"text": "when", "label": None}]
    feed = LabelledConfig(path=write_rows(tmp_path / "a.jsonl", *rows), label=None).build_for_evaluation(
        CONTEXT
    )
    batch = feed.batch(0, 2)
    assert batch.targets[ROW].tolist() == [0, 0]
    assert batch.num_targets == {ROW: 2}
    assert feed.label_names is None
    assert "2 rows, unlabelled, 0 cut" in feed.summary
    assert feed.batch(2, 2).num_targets == {ROW: 0}


@pytest.mark.parametrize(
    ("labels", "value", "problem"),
    [
        ("one", None, "'label' is null: every row needs a label.*label=null"),
        ("one", " ", "'label' is empty: every row needs a label.*label=null"),
        ("several", None, "'label' is null, but must be a list of labels.*label=null"),
        ("several", ["x", None], "'label' is null: every row needs a label"),
        ("several", ["x", {}], "'label' is a JSON object"),
        ("number", None, "'label' is null, but must be a finite number"),
        ("number", "many", "'label' is \"many\", but must be a finite number"),
        ("number", True, "'label' is true, but must be a finite number"),
    ],
)
def test_an_unlabelled_line_is_told_with_file_and_line(
    tmp_path: Path, labels: Literal["one", "several", "number"], value: object, problem: str
) -> None:
    good = {"one": "x", "several": ["x", "y"], "number": 3}[labels]
    path = write_rows(tmp_path / "a.jsonl", {"text": "a", "label": good}, {"text": "b", "label": value})
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {problem}"):
        LabelledConfig(path=path, labels=labels).build(CONTEXT)


def test_unknown_classes_among_several_are_told_with_file_and_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"text": "a", "label": ["x"]}, {"text": "b", "label": ["x", "w"]})
    config = LabelledConfig(path=path, labels="several")
    with pytest.raises(DataError, match=r"a\.jsonl:2: label 'w' is not one of the 2"):
        config.build(replace(CONTEXT, label_names=("x", "y")))
    empty = write_rows(tmp_path / "b.jsonl", {"text": "a", "label": []})
    with pytest.raises(DataError, match="no row has a label"):
        LabelledConfig(path=empty, labels="several").build(CONTEXT)


@pytest.mark.parametrize("labels", ["one", "several", "number"])
def test_ranks_that_share_encoded_rows_get_the_same_targets(
    tmp_path: Path, labels: Literal["one", "several", "number"]
) -> None:
    values = {"one": ["x", "y"], "several": [["x", "y"], ["y"]], "number": [0.1, -7]}[labels]
    path = write_rows(tmp_path / "a.jsonl", *({"text": "a", "label": value} for value in values))
    config = LabelledConfig(path=path, labels=labels)
    shared = replace(CONTEXT, cache_dir=str(tmp_path / "cache"))
    feeds = [config.build_for_evaluation(context) for context in (CONTEXT, shared, shared)]
    first, *others = [feed.batch(0, 2).targets for feed in feeds]
    for targets in others:
        assert targets.keys() == first.keys()
        assert all(torch.equal(targets[name], first[name]) for name in first)
    assert len({feed.fingerprint for feed in feeds}) == 1


def test_a_number_that_float32_cannot_hold_is_an_error_with_its_line(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": value} for value in (1.0, 1e300, 3.4e38, "-4e38")]
    path = write_rows(tmp_path / "a.jsonl", *rows)
    with pytest.raises(DataError) as raised:
        LabelledConfig(path=path, labels="number").build(CONTEXT)
    first, second = str(raised.value).splitlines()
    assert first.startswith(f"{path}:2: 'label' is 1e+300")
    assert second.startswith(f"{path}:4: 'label' is -4e+38")


def test_labels_of_any_number_of_digits_are_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("a", "9" * 5000), ("b", "10"), ("c", "9")])
    assert LabelledConfig(path=path).build(CONTEXT).label_names == ("10", "9", "9" * 5000)


@given(st.lists(st.sets(st.sampled_from("abc")), min_size=2, max_size=5).filter(any), st.randoms())
def test_fingerprints_are_equal_for_equal_sets_only(
    tmp_path_factory: pytest.TempPathFactory, rows: list[set[str]], source: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("sets")
    others = source.sample(rows, len(rows))
    found = []
    for name, sets in (("a", rows), ("b", others)):
        path = write_rows(folder / name, *({"text": "t", "label": sorted(labels)} for labels in sets))
        Path(path).rename(path := f"{path}.jsonl")
        found.append(LabelledConfig(path=path, labels="several").build_for_evaluation(CONTEXT).fingerprint)
    assert (found[0] == found[1]) == (rows == others)


def test_two_texts_need_room_for_both_and_what_separates_them(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", *({"a": "who", "b": "when", "label": x} for x in "xy"))
    config = LabelledConfig(path=path, text="a", text_pair="b")
    context = replace(CONTEXT, eos_id=1)
    for seq_len in (1, 2):
        with pytest.raises(ConfigError, match=rf"batch\.seq_len={seq_len} has no room .* 3 or more"):
            config.build(replace(context, seq_len=seq_len))
    assert config.build(replace(context, seq_len=3)).batch(0, 1).input_ids.tolist() == [[119, 1, 119]]
