"""Validation rows that are split off the training data: a share of them, or one of k folds."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mixtures import labelled_rows

from distft.config import parse
from distft.data.completion import CompletionConfig
from distft.data.dataset import DataContext
from distft.data.feed import Feed
from distft.data.images import ImagesConfig
from distft.data.labelled import LabelledConfig
from distft.data.pairs import PairsConfig
from distft.data.split import SplitConfig
from distft.data.split_rows import fold_of_rows, held_out_rows
from distft.data.targets import LABEL
from distft.errors import ConfigError, DataError

CONTEXT = DataContext(
    seq_len=16,
    vocab_size=200,
    encode=lambda text: [ord(letter) for letter in text.strip()],
    tokenizer_fingerprint="letters",
)
# Of each row: which text it has, and its label.
ROWS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3)), min_size=2, max_size=80)


def arrays(rows: list[tuple[int, int]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The groups of rows with equal texts, and the labels."""
    first: dict[int, int] = {}
    groups = [first.setdefault(text, number) for number, (text, _) in enumerate(rows)]
    return np.array(groups, np.int64), np.array([label for _, label in rows], np.int64)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(path: Path, rows: list[tuple[str, Any]], **settings: Any) -> Feed:
    file = write(path, [{"text": text, "label": label} for text, label in rows])
    return LabelledConfig(path=file, **settings).build(CONTEXT)


def split_of(feed: Feed, **settings: Any) -> tuple[Feed, Feed]:
    config: SplitConfig = parse(SplitConfig, settings)
    return config.split(feed)


def texts_of(feed: Feed, start: int = 0, stop: int | None = None) -> list[str]:
    batch = feed.batch(start, feed.num_sequences if stop is None else stop)
    lengths = [batch.input_ids.shape[1]] * len(batch.input_ids) if batch.lengths is None else batch.lengths
    return ["".join(map(chr, ids[:n])) for ids, n in zip(batch.input_ids.tolist(), lengths, strict=True)]


@given(ROWS, st.integers(2, 7), st.integers(0, 2**40))
@settings(max_examples=80, deadline=None)
def test_folds_hold_out_each_row_once_and_have_each_label_in_equal_numbers(
    rows: list[tuple[int, int]], num_folds: int, seed: int
) -> None:
    groups, labels = arrays(rows)
    folds = fold_of_rows(groups, labels, num_folds, seed)
    assert ((folds >= 0) & (folds < num_folds)).all()  # one fold a row: each is held out once
    heads = np.unique(groups)
    for label in set(labels.tolist()):
        own = folds[heads[labels[heads] == label]]
        sizes = np.bincount(own, minlength=num_folds)
        assert sizes.max() - sizes.min() <= 1
        assert len(own) < 2 or (sizes < len(own)).all()  # so it is in the training data of every fold
    assert all(len(set(folds[groups == head].tolist())) == 1 for head in heads)


@given(ROWS, st.floats(0.01, 0.99), st.integers(0, 2**40))
@settings(max_examples=80, deadline=None)
def test_each_label_has_its_share_and_equal_texts_are_on_one_side(
    rows: list[tuple[int, int]], share: float, seed: int
) -> None:
    groups, labels = arrays(rows)
    is_held = held_out_rows(groups, labels, share, seed)
    heads = np.unique(groups)
    assert all(len(set(is_held[groups == head].tolist())) == 1 for head in heads)
    for label in set(labels[heads].tolist()):
        own = heads[labels[heads] == label]
        sizes = np.bincount(groups, minlength=len(rows))[own]
        num_held = int(sizes[is_held[own]].sum())
        if len(own) == 1:
            assert num_held == 0
            continue
        assert 0 < is_held[own].sum() < len(own)
        assert abs(num_held - share * sizes.sum()) <= 1 + sizes.max()


@given(st.integers(2, 400), st.floats(0.01, 0.99), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_of_rows_that_all_differ_the_share_is_exact(num_rows: int, share: float, seed: int) -> None:
    numbers = np.arange(num_rows)
    num_held = held_out_rows(numbers, np.zeros(num_rows, np.int64), share, seed).sum()
    assert num_held == min(max(round(share * num_rows), 1), num_rows - 1)


def test_the_split_is_a_function_of_the_seed_and_the_row_numbers(tmp_path: Path) -> None:
    """Not of the texts, the tokenizer or the order of the labels: two models get the same rows."""
    kept = []
    for name, prefix in (("a", "x"), ("b", "yy")):
        rows = [(f"{prefix}{i}", "odd" if i % 2 else "even") for i in range(60)]
        _, held = split_of(labelled(tmp_path / f"{name}.jsonl", rows), share=0.2)
        kept.append([int(text.removeprefix(prefix)) for text in texts_of(held)])
    assert kept[0] == kept[1] == sorted(kept[0])
    assert len(kept[0]) == 12
    _, other = split_of(labelled(tmp_path / "a.jsonl", rows), share=0.2, split_seed=1)
    assert texts_of(other) != [f"yy{i}" for i in kept[0]]


def test_training_has_the_rest_in_reshuffled_epochs(tmp_path: Path) -> None:
    rows = [(f"t{i}", "ab"[i % 2]) for i in range(30)]
    feed = labelled(tmp_path / "a.jsonl", rows)
    train, held = split_of(feed, num_folds=5, fold=1)
    assert (train.num_sequences, held.num_sequences) == (24, 6)
    assert train.step_share == 1.0
    assert held.step_share is None
    first, second = texts_of(train, 0, 24), texts_of(train, 24, 48)
    assert sorted(first) == sorted(second)
    assert first != second
    assert sorted(first + texts_of(held)) == sorted(text for text, _ in rows)
    assert train.batch(5, 9).input_ids.tolist() == train.batch(0, 12).input_ids[5:9].tolist()
    assert train.fingerprint not in {feed.fingerprint, held.fingerprint, None}
    assert train.label_names == held.label_names == ("a", "b")
    assert train.label_counts == [12, 12]
    assert "24 of 30 rows train (fold 1 of 5, split_seed 0, by label)" in train.summary
    assert held.summary == "6 of 30 rows of the training data validate (fold 1 of 5, split_seed 0, by label)"


def test_equal_texts_and_labels_of_one_row_are_told(tmp_path: Path) -> None:
    rows = [("same", "a")] * 3 + [(f"t{i}", "ab"[i % 2]) for i in range(20)] + [("only", "rare")]
    train, held = split_of(labelled(tmp_path / "a.jsonl", rows), share=0.3)
    assert "2 rows equal an earlier one, and are on the side of that one" in train.summary
    assert "in training alone, for want of different rows: the label 'rare'" in train.summary
    assert texts_of(held).count("same") in {0, 3}
    folds = [split_of(labelled(tmp_path / "a.jsonl", rows), num_folds=3, fold=i)[0].summary for i in range(3)]
    assert sum("in validation alone, for want of different rows: the label 'rare'" in f for f in folds) == 1
    assert sum("in training alone, for want of different rows: the label 'rare'" in f for f in folds) == 2


def test_numbers_are_described_by_the_training_rows(tmp_path: Path) -> None:
    train, held = split_of(
        labelled(tmp_path / "a.jsonl", [(f"t{i}", i) for i in range(40)], labels="number"), share=0.5
    )
    own = [int(text[1:]) for text in texts_of(train)]
    assert train.numbers is not None
    assert train.numbers.mean == np.mean(own)
    assert held.num_sequences == 20


def test_of_several_labels_the_rarest_of_a_row_counts(tmp_path: Path) -> None:
    rows = [(f"t{i}", ["all", "ten"] if i < 10 else ["all"]) for i in range(100)]
    feed = labelled(tmp_path / "a.jsonl", rows, labels="several")
    folds = [texts_of(split_of(feed, num_folds=5, fold=fold)[1]) for fold in range(5)]
    assert [sum(int(text[1:]) < 10 for text in held) for held in folds] == [2] * 5


def test_rows_without_labels_are_split_by_number(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "text": f"a{i}", "other": f"b{i}"} for i in range(40)]
    path = write(tmp_path / "a.jsonl", rows)
    pairs = PairsConfig(path=path, text="text", positive="other")
    for data in (CompletionConfig(path=path), pairs, LabelledConfig(path=path, label=None)):
        train, held = split_of(data.build(CONTEXT), share=0.1)
        assert (train.num_sequences, held.num_sequences) == (36, 4)
        assert not set(texts_of(train)) & set(texts_of(held))
    _, held = split_of(pairs.build(CONTEXT), share=0.1)
    assert [text[1:] for text in texts_of(held)[::2]] == [text[1:] for text in texts_of(held)[1::2]]


def test_images_are_split_by_class() -> None:
    context = DataContext(
        seq_len=1,
        vocab_size=0,
        encode=lambda _: [],
        tokenizer_fingerprint="",
        reads_tokens=False,
        image_shape=(1, 8, 8),
    )
    data = ImagesConfig(source="digits", max_rows=200)
    train, held = split_of(data.build(context), num_folds=4, fold=3)
    classes = Counter(held.batch(0, held.num_sequences).targets[LABEL].tolist())
    assert train.num_sequences + held.num_sequences == 200
    assert set(classes) == set(range(10))


def test_rows_that_are_all_equal_cannot_be_split(tmp_path: Path) -> None:
    feed = labelled(tmp_path / "a.jsonl", [("same", "a"), ("same", "b")] * 5)
    with pytest.raises(DataError, match="nothing can be held out of 10 rows with 1 different inputs"):
        split_of(feed, share=0.5)


def test_a_mixture_of_files_cannot_be_split() -> None:
    rows = labelled_rows(3)
    feed = Feed.for_training(rows, rows, weights=(1, 1), seed=0, shuffle=True)
    with pytest.raises(ConfigError, match="takes rows off one file"):
        split_of(feed, share=0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "set either share, such as 0.1, or num_folds and fold"),
        ({"share": 0.1, "num_folds": 2, "fold": 0}, "set either share"),
        ({"num_folds": 5}, "num_folds and fold go together"),
        ({"num_folds": 5, "fold": 5}, "folds are counted from 0 to 4"),
        ({"share": 1.0}, "less than 1"),
    ],
)
def test_settings_that_make_no_split_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(SplitConfig, given)
