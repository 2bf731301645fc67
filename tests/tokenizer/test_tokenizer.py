"""The tokenizer against sentencepiece itself."""

import argparse
import inspect
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from distft.errors import DataError
from distft.tokenizer import (
    Tokenizer,
    TokenizerTrainConfig,
    import_tokenizer,
    pretokenization,
    train_tokenizer,
)
from distft.tokenizer.pretokenization import pretokenization_pattern
from distft.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

TEXT = inspect.getsource(argparse) + inspect.getsource(json)
ODD_IDS = {"unk_id": 5, "bos_id": None, "eos_id": 3, "pad_id": 0}
LOSSLESS = {
    "bpe": {"algorithm": "bpe", "vocab_size": 600},
    "unigram": {"algorithm": "unigram", "vocab_size": 600, **ODD_IDS},
    "char": {"algorithm": "char", "byte_fallback": True, "eos_id": None},
    "symbols": {
        "algorithm": "bpe",
        "vocab_size": 500,
        "unk_id": None,
        "user_defined_symbols": ("<|user turn|>", "\n\n", "a,b", '"', "x\ty", "$1"),
    },
}
NASTY = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "\u2581",
    "\u2585",
    "\u00a0",
    "\ufeff",
    "\ufffd",
    "\uffff",
    "\U0010ffff",
]
SPECIAL = [
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<|user turn|>",
    "a,b",
    "x\ty",
    "e\u0301",
    "\u00e9",
    "\U0001f468\u200d\U0001f469",
]
any_text = st.lists(
    st.one_of(
        st.sampled_from([*NASTY, *SPECIAL, "the", "return", " self", "    "]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.integers(0, len(TEXT)).map(lambda start: TEXT[start : start + 20]),
    ),
    max_size=30,
).map("".join)
plain_text = any_text.map(lambda text: text.replace("\u2581", ""))


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        name: train_tokenizer([TEXT], TokenizerTrainConfig(**settings), folder / f"{name}.model")
        for name, settings in LOSSLESS.items()
    }


def foreign_model(**options: Any) -> bytes:
    """A model trained by sentencepiece with its defaults, overridden by `options`."""
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "vocab_size": 500, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=model, **(defaults | options)
    )
    return model.getvalue()


FOREIGN: dict[str, dict[str, Any]] = {
    "sentencepiece's defaults": {},
    "as Llama's": {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
    },
    "pieces of several words": {
        "split_by_whitespace": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "letters and punctuation in one piece": {
        "split_by_unicode_script": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
    },
    "no byte fallback": {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "character_coverage": 0.98,
    },
    "spaces as suffixes": {
        "treat_whitespace_as_suffix": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
    },
    "unigram": {"model_type": "unigram", "pad_id": 3, "bos_id": -1},
}


@pytest.fixture(scope="module")
def foreign() -> dict[str, bytes]:
    return {name: foreign_model(**options) for name, options in FOREIGN.items()}


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=any_text)
def test_a_lossless_tokenizer_reproduces_every_text(
    lossless: dict[str, Tokenizer], name: str, text: str
) -> None:
    tokenizer = lossless[name]
    assert tokenizer.is_lossless
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", LOSSLESS)
@given(text=any_text)
def test_token_bytes_add_up_to_the_utf8_size_of_the_text(
    lossless: dict[str, Tokenizer], name: str, text: str
) -> None:
    tokenizer = lossless[name]
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("chunk_chars", [1, 40, 1 << 17])
@pytest.mark.parametrize("name", LOSSLESS)
@given(text=plain_text)
def test_ids_equal_those_of_sentencepiece_for_the_whole_text(
    lossless: dict[str, Tokenizer], name: str, chunk_chars: int, text: str
) -> None:
    tokenizer = SentencePieceTokenizer(lossless[name].to_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretokenization, "_CHUNK_CHARS", chunk_chars)
        assert tokenizer.encode(text) == sentencepiece_processor(tokenizer.to_bytes()).encode(text)


@pytest.mark.parametrize("chunk_chars", [1, 1 << 17])
@pytest.mark.parametrize("name", FOREIGN)
@given(text=any_text)
def test_a_foreign_model_encodes_and_decodes_as_sentencepiece_does(
    foreign: dict[str, bytes], name: str, chunk_chars: int, text: str
) -> None:
    tokenizer, processor = SentencePieceTokenizer(foreign[name]), sentencepiece_processor(foreign[name])
    if tokenizer.model_proto.has_identity_normalization:
        text = text.replace("\u2581", "")  # a deliberate difference: sentencepiece would decode it as a space
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretokenization, "_CHUNK_CHARS", chunk_chars)
        ids = tokenizer.encode(text)
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == processor.decode(ids)


@pytest.mark.parametrize("name", ["bpe", "as Llama's", "unigram"])
def test_long_texts_of_cached_and_new_words_encode_as_sentencepiece_does(
    lossless: dict[str, Tokenizer], foreign: dict[str, bytes], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lossless[name].to_bytes() if name in lossless else foreign[name]
    for constant, value in (("_CHUNK_CHARS", 2000), ("_WARM_CACHE_CHARS", 3000), ("_MAX_CACHE_CHARS", 9000)):
        monkeypatch.setattr(pretokenization, constant, value)
    numbers = " ".join(str(i * i * i) for i in range(9000))
    for text in (TEXT + numbers + TEXT, f"  {TEXT}   ", " " * 70_000 + "x" + " " * 70_000):
        assert SentencePieceTokenizer(model).encode(text) == sentencepiece_processor(model).encode(text)


def test_words_are_split_only_where_no_piece_can_cross(
    lossless: dict[str, Tokenizer], foreign: dict[str, bytes]
) -> None:
    everything = {**{name: SentencePieceTokenizer(model) for name, model in foreign.items()}, **lossless}
    patterns = {
        name: pretokenization_pattern(tokenizer.model_proto) for name, tokenizer in everything.items()
    }
    text = "  if x1 ==  caf\u00e9.b: "
    words = {name: pattern.findall(text) for name, pattern in patterns.items() if pattern}
    by_spaces = ["  if", " x1", " ==", "  caf\u00e9.b:"]
    expected = {
        "as Llama's": by_spaces,  # sentencepiece prepends a space to each word: each must begin with one
        "letters and punctuation in one piece": by_spaces,
        "no byte fallback": by_spaces,  # adjacent unknown characters are one id
        "bpe": ["  if", " x", "1", " ==", "  caf\u00e9", ".", "b", ":"],
    }
    assert words == expected


def test_ids_do_not_depend_on_num_threads(lossless: dict[str, Tokenizer]) -> None:
    texts = [TEXT, "a \u2581 b", "", *TEXT.splitlines()[:50]]
    for tokenizer in lossless.values():
        assert tokenizer.encode_batch(texts, num_threads=3) == [tokenizer.encode(text) for text in texts]


def test_special_ids_that_the_model_lacks_are_none(lossless: dict[str, Tokenizer]) -> None:
    found = {name: (t.unk_id, t.bos_id, t.eos_id, t.pad_id) for name, t in lossless.items()}
    assert found == {
        "bpe": (0, 1, 2, None),
        "unigram": (5, None, 3, 0),
        "char": (0, 1, None, None),
        "symbols": (None, 1, 2, None),
    }


def test_ids_cut_within_a_character_decode_to_the_replacement_character(
    lossless: dict[str, Tokenizer],
) -> None:
    tokenizer = lossless["bpe"]
    ids = tokenizer.encode("a\U0001f600b")
    assert tokenizer.decode([ids[0], *ids[2:]]).startswith("a\ufffd")


@pytest.mark.parametrize("bad", [-1, 600])
def test_decoding_an_id_outside_the_vocabulary_is_an_error(lossless: dict[str, Tokenizer], bad: int) -> None:
    with pytest.raises(DataError, match=f"token id {bad} is outside the vocabulary of 600"):
        lossless["bpe"].decode([1, bad])


@pytest.mark.parametrize("name", LOSSLESS)
def test_the_error_for_a_lone_surrogate_gives_its_position(lossless: dict[str, Tokenizer], name: str) -> None:
    for encode in (
        lossless[name].encode,
        lambda text: lossless[name].encode_batch([text, "b"], num_threads=2),
    ):
        with pytest.raises(DataError, match=r"character 4 of a text is the lone surrogate U\+D800"):
            encode("a b \ud800 c")


def test_a_char_model_without_byte_fallback_decodes_unknown_characters_to_the_replacement(
    tmp_path: Path,
) -> None:
    config = TokenizerTrainConfig(algorithm="char", bos_id=None, eos_id=None)
    tokenizer = train_tokenizer(["to be,\tor\nnot"], config, tmp_path / "char.model")
    assert tokenizer.vocab_size == len(set("to be,\tor\nnot")) + 1
    assert tokenizer.decode(tokenizer.encode("to be,\tor\nnot")) == "to be,\tor\nnot"
    assert tokenizer.decode(tokenizer.encode("to\u2581be q")) == "to\ufffdbe \ufffd"
    assert not tokenizer.is_lossless


def test_a_fingerprint_does_not_depend_on_the_path(lossless: dict[str, Tokenizer], tmp_path: Path) -> None:
    for tokenizer in lossless.values():
        tokenizer.save(tmp_path / "deeper" / "copy.model")
        assert Tokenizer.load(tmp_path / "deeper" / "copy.model").fingerprint == tokenizer.fingerprint
    assert len({tokenizer.fingerprint for tokenizer in lossless.values()}) == len(lossless)


def test_a_fingerprint_depends_on_settings_and_special_ids(foreign: dict[str, bytes]) -> None:
    same = foreign_model()
    assert (
        SentencePieceTokenizer(same).fingerprint
        == SentencePieceTokenizer(foreign["sentencepiece's defaults"]).fingerprint
    )
    others = [foreign_model(bos_id=-1), foreign_model(add_dummy_prefix=False), foreign_model(pad_id=3)]
    assert len({SentencePieceTokenizer(model).fingerprint for model in [same, *others]}) == 4


def test_importing_copies_the_model(foreign: dict[str, bytes], tmp_path: Path) -> None:
    source = tmp_path / "source.model"
    source.write_bytes(foreign["unigram"])
    imported = import_tokenizer(source, tmp_path / "imported" / "tokenizer.model")
    assert (imported.bos_id, imported.pad_id, imported.is_lossless) == (None, 3, False)
    assert (tmp_path / "imported" / "tokenizer.model").read_bytes() == foreign["unigram"]


@given(junk=st.binary(max_size=200))
def test_invalid_bytes_are_not_a_model(junk: bytes) -> None:
    with pytest.raises(DataError):
        SentencePieceTokenizer(junk)


def test_the_error_for_a_missing_tokenizer_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.model cannot be read.*distft tokenizer train"):
        Tokenizer.load(tmp_path / "nowhere.model")
    (tmp_path / "text.model").write_text("not a model at all")
    with pytest.raises(DataError, match=r"text\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "text.model")


@pytest.mark.parametrize("name", [*LOSSLESS, *FOREIGN])
def test_the_parsed_model_proto_agrees_with_sentencepiece(
    lossless: dict[str, Tokenizer], foreign: dict[str, bytes], name: str
) -> None:
    model = lossless[name].to_bytes() if name in lossless else foreign[name]
    model_proto, processor = SentencePieceTokenizer(model).model_proto, sentencepiece_processor(model)
    numbers = range(processor.get_piece_size())
    assert [p.text for p in model_proto.pieces] == [processor.id_to_piece(i) for i in numbers]
    assert np.allclose([p.score for p in model_proto.pieces], [processor.get_score(i) for i in numbers])
    assert [p.type.name == "BYTE" for p in model_proto.pieces] == [processor.is_byte(i) for i in numbers]
    assert [p.type.name == "CONTROL" for p in model_proto.pieces] == [
        processor.is_control(i) for i in numbers
    ]


def sentencepiece_processor(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)
