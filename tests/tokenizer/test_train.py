"""Training a vocabulary: sampling, determinism, errors."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distft.errors import ConfigError
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer
from distft.tokenizer.sample import sample_sentences, split_text

TEXT = inspect.getsource(textwrap)


@given(text=st.text(st.sampled_from("ab \n\u00e9\U0001f600"), max_size=300).map(lambda t: t * 40))
def test_split_text_loses_nothing(text: str) -> None:
    sentences = list(split_text(text))
    assert "".join(sentences) == text
    assert all(0 < len(sentence.encode()) <= 4000 for sentence in sentences)


def test_split_text_splits_before_white_space() -> None:
    sentences = list(split_text("word \n" * 2000))
    assert len(sentences) > 5
    assert all(sentence.startswith(" \nword") and sentence.endswith("word") for sentence in sentences[1:-1])


@given(
    texts=st.lists(st.text(st.sampled_from("abc \u00e9"), min_size=1, max_size=50), max_size=40),
    max_bytes=st.integers(1, 300),
    seed=st.integers(0, 3),
)
def test_a_sample_is_bounded_ordered_and_deterministic(texts: list[str], max_bytes: int, seed: int) -> None:
    sample = sample_sentences(iter(texts), max_bytes, seed)
    assert sum(len(sentence.encode()) for sentence in sample) <= max_bytes
    assert sample == sample_sentences(texts, max_bytes, seed)
    remaining = iter(texts)
    assert all(sentence in remaining for sentence in sample)
    if sum(len(text.encode()) for text in texts) <= max_bytes:
        assert sample == texts


def test_a_sample_is_uniform_and_depends_on_the_seed() -> None:
    texts = [f"{i:04d}" for i in range(4000)]
    sample = [int(sentence) for sentence in sample_sentences(texts, 1600, seed=0)]
    assert len(sample) == 400
    assert all(60 < sum(start <= i < start + 1000 for i in sample) < 140 for start in range(0, 4000, 1000))
    assert sample_sentences(texts, 1600, seed=0) != sample_sentences(texts, 1600, seed=1)


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "char"])
def test_the_same_text_gives_the_same_tokenizer(algorithm: Any, tmp_path: Path) -> None:
    size = None if algorithm == "char" else 400
    config = TokenizerTrainConfig(algorithm=algorithm, vocab_size=size)
    first, second = (train_tokenizer([TEXT], config, tmp_path / name).fingerprint for name in "ab")
    assert first == second


def test_a_very_long_line_is_used_completely(tmp_path: Path) -> None:
    line = "abc " * 50_000 + "\u00e6" + "xyz" * 50_000 + "\u00f8"
    tokenizer = train_tokenizer([line], TokenizerTrainConfig(algorithm="char"), tmp_path / "char.model")
    assert tokenizer.unk_id not in tokenizer.encode(line)


def test_text_next_to_reserved_characters_is_learned(tmp_path: Path) -> None:
    text = "abc\u2585def\u2581ghi\0jkl\n"
    tokenizer = train_tokenizer([text] * 3, TokenizerTrainConfig(algorithm="char"), tmp_path / "char.model")
    assert tokenizer.unk_id not in tokenizer.encode("abcdefghijkl\n")


def test_a_user_defined_symbol_is_always_one_id(tmp_path: Path) -> None:
    symbols = ("<|end|>", "two words", "\n\n", 'a "quoted, one"')
    config = TokenizerTrainConfig(vocab_size=400, user_defined_symbols=symbols)
    tokenizer = train_tokenizer([TEXT], config, tmp_path / "symbols.model")
    for symbol in symbols:
        assert len(tokenizer.encode(symbol)) == 1
        assert tokenizer.encode(symbol)[0] in tokenizer.encode(f"before{symbol}after")


def test_training_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer([TEXT], TokenizerTrainConfig(algorithm="unigram", vocab_size=400), tmp_path / "a.model")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_the_error_for_too_large_a_vocabulary_gives_the_largest_possible(
    algorithm: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size=8192 is more than .* at most") as caught:
        train_tokenizer([TEXT], TokenizerTrainConfig(algorithm=algorithm), tmp_path / "a.model")
    largest = int(str(caught.value).partition("at most ")[2].split()[0])
    config = TokenizerTrainConfig(algorithm=algorithm, vocab_size=largest)
    assert train_tokenizer([TEXT], config, tmp_path / "a.model").vocab_size == largest


def test_the_error_for_too_small_a_vocabulary_gives_the_smallest_possible(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size=100 is too small") as caught:
        train_tokenizer([TEXT], TokenizerTrainConfig(vocab_size=100), tmp_path / "a.model")
    smallest = int(str(caught.value).partition("at least ")[2].split()[0])
    assert train_tokenizer([TEXT], TokenizerTrainConfig(vocab_size=smallest), tmp_path / "a.model")


@pytest.mark.parametrize("texts", [[], [""], ["\n\n"], ["\0"]])
def test_training_without_text_is_an_error(texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no text to train a tokenizer on"):
        train_tokenizer(texts, TokenizerTrainConfig(), tmp_path / "a.model")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"unk_id": None, "algorithm": "char"}, "unk_id is missing"),
        ({"bos_id": 2}, "must differ"),
        ({"eos_id": 9000}, "below vocab_size=8192"),
        ({"user_defined_symbols": ["a", "a"]}, "a symbol twice"),
        ({"user_defined_symbols": ["a\u2581"]}, "cannot be a symbol"),
        ({"user_defined_symbols": ["<0x41>"]}, "cannot be a symbol"),
        ({"user_defined_symbols": [""]}, "cannot be a symbol"),
    ],
)
def test_impossible_settings_are_refused_at_validation(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        TokenizerTrainConfig(**settings)
