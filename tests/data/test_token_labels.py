"""Sentences with a label for each word: files, first tokens of words, and what is wrong with them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.library_tokenizers import write_bert

from distft.data.dataset import DataContext, TextTemplate
from distft.data.split import SplitConfig
from distft.data.targets import IGNORE_INDEX, TOKEN_LABEL
from distft.data.token_labels import TokenLabelsConfig
from distft.errors import ConfigError, DataError
from distft.tokenizer import Tokenizer

LETTERS = DataContext(
    seq_len=40,
    vocab_size=200,
    encode=lambda text: [ord(letter) for letter in text],
    tokenizer_fingerprint="letters",
)
SENTENCES = [
    (["Ada", "met", "Jo", "."], ["B-PER", "O", "B-PER", "O"]),
    (["In", "New", "York"], ["O", "B-LOC", "I-LOC"]),
]
WORDS = st.text("abcd", min_size=1, max_size=5)


def write_json(path: Path, sentences: Any) -> str:
    path.write_text(
        "".join(json.dumps({"tokens": words, "labels": labels}) + "\n" for words, labels in sentences)
    )
    return str(path)


def rows_of(feed: Any) -> list[tuple[list[int], list[int]]]:
    """Tokens and targets of each row, without padding."""
    batch = feed.batch(0, feed.num_sequences)
    rows = zip(
        batch.input_ids.tolist(), batch.targets[TOKEN_LABEL].tolist(), batch.lengths.tolist(), strict=True
    )
    return [(ids[:length], labels[:length]) for ids, labels, length in rows]


@given(
    st.lists(
        st.lists(st.tuples(WORDS, st.sampled_from("xyz")), min_size=1, max_size=6), min_size=1, max_size=5
    )
)
@settings(max_examples=40, deadline=None)
def test_the_first_token_of_each_word_has_its_label(sentences: list[list[tuple[str, str]]]) -> None:
    import tempfile

    split = [([w for w, _ in s], [label for _, label in s]) for s in sentences]
    split.append((["a", "b", "c"], ["x", "y", "z"]))
    with tempfile.TemporaryDirectory() as folder:
        feed = TokenLabelsConfig(path=write_json(Path(folder, "a.jsonl"), split)).build_for_evaluation(
            LETTERS
        )
    assert feed.label_names == ("x", "y", "z")
    for (words, labels), (ids, targets) in zip(split, rows_of(feed), strict=True):
        assert "".join(map(chr, ids)) == " ".join(words)
        starts = np.cumsum([0, *(len(word) + (i > 0) for i, word in enumerate(words))])[:-1]
        expected = [IGNORE_INDEX] * len(ids)
        for start, label in zip(starts, labels, strict=True):
            expected[start] = "xyz".index(label)
        assert targets == expected


def test_columns_of_conll_are_the_same_sentences(tmp_path: Path) -> None:
    lines = ["-DOCSTART- -X- O O", ""]
    for words, labels in SENTENCES:
        lines += [f"{word} NN {label}" for word, label in zip(words, labels, strict=True)] + [""]
    columns = tmp_path / "a.conll"
    columns.write_text("\n".join(lines))
    tabs = tmp_path / "a.tsv"
    tabs.write_text("\n".join(line.replace(" ", "\t") for line in lines).rstrip())  # no line behind the last
    expected = TokenLabelsConfig(path=write_json(tmp_path / "a.jsonl", SENTENCES)).build_for_evaluation(
        LETTERS
    )
    for path in (columns, tabs):
        feed = TokenLabelsConfig(path=str(path)).build_for_evaluation(LETTERS)
        assert rows_of(feed) == rows_of(expected)
        assert feed.label_names == ("B-LOC", "B-PER", "I-LOC", "O")
    other = TokenLabelsConfig(path=str(columns), label_column=1)
    with pytest.raises(DataError, match="all words have the label 'NN'"):
        other.build_for_evaluation(LETTERS)


def test_words_are_the_tokens_that_transformers_labels(tmp_path: Path) -> None:
    """`is_split_into_words`, and the first token of each of `word_ids`."""
    import transformers

    write_bert(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    context = replace(
        LETTERS,
        vocab_size=tokenizer.vocab_size,
        encode=tokenizer.encode,
        template=TextTemplate(before=(tokenizer.bos_id or 0,), behind=(tokenizer.eos_id or 0,)),
    )
    sentences = [(["unhappily", "knowing,", "trout", "perch's"], ["A", "B", "A", "B"]), (["the"], ["A"])]
    feed = TokenLabelsConfig(path=write_json(tmp_path / "a.jsonl", sentences)).build_for_evaluation(context)
    oracle = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for (words, labels), (ids, targets) in zip(sentences, rows_of(feed), strict=True):
        encoded = oracle(words, is_split_into_words=True)
        assert ids == encoded["input_ids"]
        of_words = encoded.word_ids()
        firsts = [of_words.index(number) for number in range(len(words))]
        assert [i for i, target in enumerate(targets) if target != IGNORE_INDEX] == firsts
        assert [targets[i] for i in firsts] == ["AB".index(label) for label in labels]
        assert (
            any(len([w for w in of_words if w == number]) > 1 for number in range(len(words)))
            or len(words) == 1
        )


def test_a_tokenizer_that_puts_spaces_before_texts_itself_gets_none(tmp_path: Path) -> None:
    """As Llama 2's: `encode("a b")` is the tokens of `a` and those of `b`."""
    prefixing = replace(LETTERS, encode=lambda text: [ord(letter) for letter in f" {text}"])
    feed = TokenLabelsConfig(path=write_json(tmp_path / "a.jsonl", SENTENCES)).build_for_evaluation(prefixing)
    assert "".join(map(chr, rows_of(feed)[0][0])) == " Ada met Jo ."


def test_words_beyond_the_row_are_left_out_and_counted(tmp_path: Path) -> None:
    context = replace(LETTERS, seq_len=12, template=TextTemplate(before=(1,), behind=(2,)))
    feed = TokenLabelsConfig(path=write_json(tmp_path / "a.jsonl", SENTENCES)).build_for_evaluation(context)
    (ids, targets), _ = rows_of(feed)
    assert ids == [1, *map(ord, "Ada met Jo"), 2]
    assert [target for target in targets if target >= 0] == [1, 3, 1]
    assert "2 sentences, 7 words, 4 labels, 2 cut to seq_len=12" in feed.summary
    assert "labels of words: 'O' 3, 'B-PER' 2, 'B-LOC' 1, 'I-LOC' 1" in feed.summary
    with pytest.raises(ConfigError, match="no room for a word"):
        TokenLabelsConfig(path=str(tmp_path / "a.jsonl")).build(replace(context, seq_len=2))


def test_unlabelled_words_count_all_alike(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("one\ntwo\n\nthree\n")
    feed = TokenLabelsConfig(path=str(path), labels=None).build_for_evaluation(LETTERS)
    assert feed.label_names is None
    assert [[t for t in targets if t != IGNORE_INDEX] for _, targets in rows_of(feed)] == [[0, 0], [0]]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"tokens": ["a", "b"], "labels": ["O"]}, "2 'tokens' and 1 'labels': each word needs one label."),
        ({"tokens": [], "labels": []}, "'tokens' is empty: a sentence needs words."),
        ({"tokens": ["a", " "], "labels": ["O", "O"]}, "'tokens': entry 2 is empty."),
        ({"tokens": ["a", 3], "labels": ["O", "O"]}, "'tokens': entry 2 is 3, but must be a string."),
        ({"tokens": "a b", "labels": ["O", "O"]}, "'tokens' must be a list of strings"),
        ({"words": ["a"], "labels": ["O"]}, "has no column 'tokens'"),
        ({"tokens": ["a"], "labels": ["B-PRE"]}, "label 'B-PRE' is not one of the 4 that the model"),
    ],
)
def test_a_bad_sentence_is_an_error_with_file_and_line(tmp_path: Path, line: Any, problem: str) -> None:
    path = Path(write_json(tmp_path / "a.jsonl", SENTENCES))
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    context = replace(LETTERS, label_names=("B-LOC", "B-PER", "I-LOC", "O"))
    with pytest.raises(DataError) as raised:
        TokenLabelsConfig(path=str(path)).build(context)
    assert str(raised.value).startswith(f"{path}:3: {problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"a O\nb\n", "2: has the word 'b' alone, and no label behind it."),
        (b"a\tO\nb\t\n", "2: has an empty column where a word or a label is read."),
        (b"a O\n\xff O\n", "2: is not UTF-8"),
        (b"\n\n", "has no sentences"),
    ],
)
def test_a_bad_line_of_columns_is_an_error(tmp_path: Path, text: bytes, problem: str) -> None:
    path = tmp_path / "a.conll"
    path.write_bytes(text)
    with pytest.raises(DataError) as raised:
        TokenLabelsConfig(path=str(path)).build(LETTERS)
    assert problem in str(raised.value)


def test_a_missing_file_and_one_of_another_kind_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        TokenLabelsConfig(path=str(tmp_path / "b.conll")).build(LETTERS)
    with pytest.raises(DataError, match="unknown file type"):
        TokenLabelsConfig(path=str(tmp_path / "b.csv")).build(LETTERS)


def test_sentences_are_split_off_as_other_rows(tmp_path: Path) -> None:
    sentences = [([f"w{i}"], ["ab"[i % 2]]) for i in range(20)]
    feed = TokenLabelsConfig(path=write_json(tmp_path / "a.jsonl", sentences)).build(LETTERS)
    train, held = SplitConfig(share=0.2).split(feed)
    assert (train.num_sequences, held.num_sequences) == (16, 4)
    assert held.label_names == ("a", "b")
