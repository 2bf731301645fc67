"""Exported tokenizers, loaded by transformers' `AutoTokenizer`, give the ids of distft's tokenizer."""

import argparse
import inspect
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from support.huggingface_models import make_distft_model, save_model

from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.model.transformer_config import TransformerConfig
from distft.tokenizer import Tokenizer, TokenizerTrainConfig, train_tokenizer
from distft.tokenizer.huggingface_export import huggingface_files as tokenizer_files
from distft.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

TEXT = inspect.getsource(argparse) + inspect.getsource(json) + "Grüße, déjà vu, 日本語テキスト 😀\n" * 9
SYMBOLS = ("<|user turn|>", "\n\n", "a,b", "x\ty")
TRAINED: dict[str, dict[str, Any]] = {
    "bpe": {"algorithm": "bpe"},
    "bpe_symbols": {"algorithm": "bpe", "unk_id": None, "user_defined_symbols": SYMBOLS},
    "bpe_ids": {"algorithm": "bpe", "unk_id": 5, "bos_id": None, "eos_id": 3, "pad_id": 0},
    "bpe_unknowns": {"algorithm": "bpe", "byte_fallback": False},
    "char": {"algorithm": "char", "pad_id": 3},
    "char_bytes": {"algorithm": "char", "byte_fallback": True, "user_defined_symbols": SYMBOLS},
}
# Like other projects' models: sentencepiece adds a space before each text, among other things.
SENTENCEPIECE_MODELS: dict[str, dict[str, Any]] = {
    "sentencepiece_bpe": {"model_type": "bpe", "byte_fallback": True},
    "sentencepiece_char": {"model_type": "char"},
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


def train_with_sentencepiece(**options: Any) -> Tokenizer:
    model = io.BytesIO()
    size = {} if options.get("model_type") == "char" else {"vocab_size": 600}
    settings = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **size, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, minloglevel=2, **settings
    )
    return SentencePieceTokenizer(model.getvalue())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """distft's tokenizer of each kind, and the one that transformers loads from its export."""
    import transformers

    made: dict[str, tuple[Tokenizer, Any]] = {}
    for kind in (*TRAINED, *SENTENCEPIECE_MODELS):
        folder = tmp_path_factory.mktemp(kind)
        if kind in TRAINED:
            size = {} if TRAINED[kind]["algorithm"] == "char" else {"vocab_size": 600}
            training = TokenizerTrainConfig.model_validate({**size, **TRAINED[kind]})
            tokenizer = train_tokenizer(TEXT.splitlines(keepends=True), training, folder / "t.model")
        else:
            tokenizer = train_with_sentencepiece(**SENTENCEPIECE_MODELS[kind])
        config = TransformerConfig(
            vocab_size=tokenizer.vocab_size, max_seq_len=99, d_model=4, num_layers=1, num_heads=1
        )
        source = save_model(make_distft_model(config), folder / "distft", tokenizer=tokenizer)
        write_huggingface(source, str(folder / "exported"))
        made[kind] = (tokenizer, transformers.AutoTokenizer.from_pretrained(folder / "exported"))
    return made


@pytest.mark.parametrize("kind", [*TRAINED, *SENTENCEPIECE_MODELS])
@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_hard_texts_have_equal_ids(pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str) -> None:
    tokenizer, exported = pairs[kind]
    assert exported(text)["input_ids"] == tokenizer.encode(text)


@pytest.mark.parametrize("kind", [*TRAINED, *SENTENCEPIECE_MODELS])
def test_ordinary_texts_have_equal_ids(pairs: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    tokenizer, exported = pairs[kind]
    lines = inspect.getsource(random).splitlines(keepends=True)
    texts = ["".join(lines[i : i + 5]) for i in range(0, len(lines), 5)]
    for text, found in zip(texts, exported(texts, verbose=False)["input_ids"], strict=True):
        assert found == tokenizer.encode(text)


@pytest.mark.parametrize("kind", [*TRAINED, *SENTENCEPIECE_MODELS])
@given(
    text=st.lists(
        st.sampled_from([" ", "  ", "a", "b", ",", "ab", "the", "\n", "<", "0x41>", "é", "日", "\u2581", "|"])
        | st.characters(codec="utf-8"),
        max_size=30,
    ).map("".join)
)
def test_random_texts_have_equal_ids(pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str) -> None:
    tokenizer, exported = pairs[kind]
    assert exported(text)["input_ids"] == tokenizer.encode(text)


@pytest.mark.parametrize("kind", [kind for kind in TRAINED if kind not in {"bpe_unknowns", "char"}])
@pytest.mark.parametrize("text", HARD, ids=ascii)
def test_ids_are_decoded_to_the_text(pairs: dict[str, tuple[Tokenizer, Any]], kind: str, text: str) -> None:
    tokenizer, exported = pairs[kind]
    assert exported.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", [*TRAINED, *SENTENCEPIECE_MODELS])
def test_special_ids_are_equal(pairs: dict[str, tuple[Tokenizer, Any]], kind: str) -> None:
    tokenizer, exported = pairs[kind]
    assert len(exported) == tokenizer.vocab_size
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(exported, f"{name}_token_id") == getattr(tokenizer, f"{name}_id")
    assert exported.model_max_length == 99


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "word"}, "it is a word model"),
        ({"model_type": "unigram"}, "it is a unigram model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes characters"),
        ({"remove_extra_whitespaces": True}, "it removes spaces"),
        ({"treat_whitespace_as_suffix": True}, "it treats spaces in an unusual way"),
        (
            {"model_type": "bpe", "user_defined_symbols": ["<sep>"]},
            "it adds a space before each text and has user-defined symbols",
        ),
    ],
    ids=str,
)
def test_an_unsupported_tokenizer_is_exported_as_tokenizer_model_only(
    options: dict[str, Any], reason: str
) -> None:
    tokenizer = train_with_sentencepiece(**options)
    files, notes = tokenizer_files(tokenizer, max_seq_len=9)
    assert files == {"tokenizer.model": tokenizer.to_bytes()}
    assert len(notes) == 1
    assert reason in notes[0]


def test_a_checkpoint_without_a_tokenizer_is_exported_without_one(tmp_path: Path) -> None:
    shape = TransformerConfig(vocab_size=9, max_seq_len=9, d_model=4, num_layers=1, num_heads=1)
    notes = write_huggingface(
        save_model(make_distft_model(shape), tmp_path / "distft"), str(tmp_path / "exported")
    )
    assert any("no tokenizer" in note for note in notes)
    assert not list((tmp_path / "exported").glob("tokenizer*"))
    raw = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert [raw[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3
