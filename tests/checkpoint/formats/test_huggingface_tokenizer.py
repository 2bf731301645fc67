"""Exported tokenizers give the ids that ours give: `AutoTokenizer` of transformers says which those are."""

import argparse
import inspect
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from huggingface_models import make_ours, save_ours
from hypothesis import given
from hypothesis import strategies as st

from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.formats.huggingface_tokenizer import tokenizer_files
from distft.model.config import ModelConfig
from distft.tokenizer import Tokenizer, TokenizerTrainConfig, train_tokenizer

TEXT = inspect.getsource(argparse) + inspect.getsource(json) + "Grüße, déjà vu, 日本語テキスト 😀\n" * 9
SYMBOLS = ("<|user turn|>", "\n\n", "a,b", "x\ty")
TRAINED: dict[str, dict[str, Any]] = {
    "bpe": {"algorithm": "bpe"},
    "bpe_symbols": {"algorithm": "bpe", "unk_id": None, "user_defined_symbols": SYMBOLS},
    "bpe_unknowns": {"algorithm": "bpe", "byte_fallback": False},
    "unigram": {"algorithm": "unigram", "unk_id": 5, "bos_id": None, "eos_id": 3, "pad_id": 0},
    "unigram_symbols": {"algorithm": "unigram", "user_defined_symbols": SYMBOLS},
    "char": {"algorithm": "char", "pad_id": 3},
    "char_bytes": {"algorithm": "char", "byte_fallback": True, "user_defined_symbols": SYMBOLS},
}
# As models of others are: a space before each text, among other things.
FOREIGN: dict[str, dict[str, Any]] = {
    "foreign_bpe": {"model_type": "bpe", "byte_fallback": True},
    "foreign_unigram": {"model_type": "unigram", "byte_fallback": True, "user_defined_symbols": ["<sep>"]},
    "foreign_char": {"model_type": "char"},
}
HARD = [
    "",
    " ",
    "   three  two one ",
    "\n\n\ttab\r\n",
    "\0",
    "\u2581",
    "a\u2581b \u2581",
    "\u2585",
    "\u00a0\ufeff\ufffd\uffff\U0010ffff",
    "e\u0301 \u00e9 \u1112\u1161\u11ab",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "<0x41> <0x0A><0xGG>",
    "<|user turn|>a,b\n\nx\tya,b,b",
    "ababababababab" + " " * 33 + "aaaaaaaaaaaaaaaaa",
    "日本語テキスト, déjà vu",
    "שלום العربية हिन्दी ไทย",
]


def foreign(**options: Any) -> Tokenizer:
    model = io.BytesIO()
    size = {} if options.get("model_type") == "char" else {"vocab_size": 600}
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **size, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, minloglevel=2, **settings
    )
    return Tokenizer(model.getvalue())


def assert_same_ids(kind: str, found: list[int], expected: list[int]) -> None:
    """Of a unigram model's cuts with equal sums of scores rounding chooses: the same pieces, reordered."""
    if "unigram" in kind:
        assert sorted(found) == sorted(expected)
    else:
        assert found == expected


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """Our tokenizer of each kind, and what transformers loads from our export of it."""
    import transformers

    made: dict[str, tuple[Tokenizer, Any]] = {}
    for kind in (*TRAINED, *FOREIGN):
        folder = tmp_path_factory.mktemp(kind)
        if kind in TRAINED:
            size = {} if TRAINED[kind]["algorithm"] == "char" else {"vocab_size": 600}
            config = TokenizerTrainConfig.model_validate({**size, **TRAINED[kind]})
            ours = train_tokenizer(TEXT.splitlines(keepends=True), config, folder / "t.model")
        else:
            ours = foreign(**FOREIGN[kind])
        shape = ModelConfig(vocab_size=ours.vocab_size, max_seq_len=99, d_model=4, num_layers=1, num_heads=1)
        source = save_ours(make_ours(shape), folder / "ours", tokenizer=ours)
        write_huggingface(source, str(folder / "theirs"))
        made[kind] = (ours, transformers.AutoTokenizer.from_pretrained(folder / "theirs"))
    return made


@pytest.mark.parametrize("kind", [*TRAINED, *FOREIGN])
@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_hard_texts_have_our_ids(pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str) -> None:
    ours, theirs = pairs[kind]
    assert theirs(text)["input_ids"] == ours.encode(text)


@pytest.mark.parametrize("kind", [*TRAINED, *FOREIGN])
def test_ordinary_texts_have_our_ids(pairs: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    ours, theirs = pairs[kind]
    lines = inspect.getsource(random).splitlines(keepends=True)
    texts = ["".join(lines[i : i + 5]) for i in range(0, len(lines), 5)]
    for text, found in zip(texts, theirs(texts, verbose=False)["input_ids"], strict=True):
        assert_same_ids(kind, found, ours.encode(text))


@pytest.mark.parametrize("kind", [*TRAINED, *FOREIGN])
@given(
    text=st.lists(
        st.sampled_from([" ", "  ", "a", "b", ",", "ab", "the", "\n", "<", "0x41>", "é", "日", "\u2581", "|"])
        | st.characters(codec="utf-8"),
        max_size=30,
    ).map("".join)
)
def test_random_texts_have_our_ids(pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str) -> None:
    ours, theirs = pairs[kind]
    assert_same_ids(kind, theirs(text)["input_ids"], ours.encode(text))


@pytest.mark.parametrize("kind", [kind for kind in TRAINED if kind not in {"bpe_unknowns", "char"}])
@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_ids_become_the_text_again(pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str) -> None:
    ours, theirs = pairs[kind]
    assert theirs.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", [*TRAINED, *FOREIGN])
def test_special_ids_are_ours(pairs: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    ours, theirs = pairs[kind]
    assert len(theirs) == ours.vocab_size
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(theirs, f"{name}_token_id") == getattr(ours, f"{name}_id")
    assert theirs.model_max_length == 99


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "word"}, "it is a word model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes characters"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        ({"treat_whitespace_as_suffix": True}, "it treats spaces in a way of its own"),
        (
            {"model_type": "bpe", "user_defined_symbols": ["<sep>"]},
            "it puts a space before texts, and has symbols",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_is_said_and_not_tried(options: dict[str, Any], reason: str) -> None:
    tokenizer = foreign(**options)
    files, notes = tokenizer_files(tokenizer, max_seq_len=9)
    assert files == {"tokenizer.model": tokenizer.to_bytes()}
    assert len(notes) == 1
    assert reason in notes[0]


def test_a_checkpoint_without_a_tokenizer_is_exported_without_one(tmp_path: Path) -> None:
    shape = ModelConfig(vocab_size=9, max_seq_len=9, d_model=4, num_layers=1, num_heads=1)
    notes = write_huggingface(save_ours(make_ours(shape), tmp_path / "ours"), str(tmp_path / "theirs"))
    assert any("no tokenizer" in note for note in notes)
    assert not list((tmp_path / "theirs").glob("tokenizer*"))
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert [raw[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
