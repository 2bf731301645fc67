"""What a tokenizer promises, against sentencepiece itself."""

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
from distft.tokenizer import Tokenizer, TokenizerTrainConfig, import_tokenizer, train_tokenizer
from distft.tokenizer import words as words_module
from distft.tokenizer.words import word_pattern

TEXT = inspect.getsource(argparse) + inspect.getsource(json)
ODD_IDS = {"unk_id": 5, "bos_id": None, "eos_id": 3, "pad_id": 0}
EXACT = {
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
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        name: train_tokenizer([TEXT], TokenizerTrainConfig(**settings), folder / f"{name}.model")
        for name, settings in EXACT.items()
    }


def foreign_model(**options: Any) -> bytes:
    """A model as others train it: sentencepiece's own defaults, unless `options` say otherwise."""
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


@pytest.mark.parametrize("name", EXACT)
@given(text=any_text)
def test_every_text_comes_back_as_it_was(exact: dict[str, Tokenizer], name: str, text: str) -> None:
    tokenizer = exact[name]
    assert tokenizer.is_exact
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", EXACT)
@given(text=any_text)
def test_token_bytes_add_up_to_the_bytes_of_the_text(
    exact: dict[str, Tokenizer], name: str, text: str
) -> None:
    tokenizer = exact[name]
    assert tokenizer.token_bytes()[tokenizer.encode(text)].sum() == len(text.encode())


@pytest.mark.parametrize("slab_chars", [1, 40, 1 << 17])
@pytest.mark.parametrize("name", EXACT)
@given(text=plain_text)
def test_ids_are_those_of_sentencepiece_over_the_whole_text(
    exact: dict[str, Tokenizer], name: str, slab_chars: int, text: str
) -> None:
    tokenizer = Tokenizer(exact[name].to_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words_module, "_SLAB_CHARS", slab_chars)
        assert tokenizer.encode(text) == oracle(tokenizer.to_bytes()).encode(text)


@pytest.mark.parametrize("slab_chars", [1, 1 << 17])
@pytest.mark.parametrize("name", FOREIGN)
@given(text=any_text)
def test_a_foreign_model_encodes_and_decodes_as_sentencepiece_does(
    foreign: dict[str, bytes], name: str, slab_chars: int, text: str
) -> None:
    tokenizer, processor = Tokenizer(foreign[name]), oracle(foreign[name])
    if tokenizer.description.keeps_text:
        text = text.replace("\u2581", "")  # there sentencepiece is not followed: it would return a space
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words_module, "_SLAB_CHARS", slab_chars)
        ids = tokenizer.encode(text)
    assert ids == processor.encode(text)
    assert tokenizer.decode(ids) == processor.decode(ids)


@pytest.mark.parametrize("name", ["bpe", "as Llama's", "unigram"])
def test_long_texts_of_old_and_of_new_words_encode_as_in_one_piece(
    exact: dict[str, Tokenizer], foreign: dict[str, bytes], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exact[name].to_bytes() if name in exact else foreign[name]
    for constant, value in (("_SLAB_CHARS", 2000), ("_WARM_CHARS", 3000), ("_MAX_KNOWN_CHARS", 9000)):
        monkeypatch.setattr(words_module, constant, value)
    numbers = " ".join(str(i * i * i) for i in range(9000))
    for text in (TEXT + numbers + TEXT, f"  {TEXT}   ", " " * 70_000 + "x" + " " * 70_000):
        assert Tokenizer(model).encode(text) == oracle(model).encode(text)


def test_words_are_cut_apart_only_where_no_piece_can_join_them(
    exact: dict[str, Tokenizer], foreign: dict[str, bytes]
) -> None:
    everything = {**{name: Tokenizer(model) for name, model in foreign.items()}, **exact}
    patterns = {name: word_pattern(tokenizer.description) for name, tokenizer in everything.items()}
    text = "  if x1 ==  caf\u00e9.b: "
    cuts = {name: pattern.findall(text) for name, pattern in patterns.items() if pattern}
    by_spaces = ["  if", " x1", " ==", "  caf\u00e9.b:"]
    assert cuts == {
        "as Llama's": by_spaces,  # each word is given a space by sentencepiece: none may begin without
        "letters and punctuation in one piece": by_spaces,
        "no byte fallback": by_spaces,  # unknown characters side by side are one id
        "bpe": ["  if", " x", "1", " ==", "  caf\u00e9", ".", "b", ":"],
    }


def test_threads_change_no_ids(exact: dict[str, Tokenizer]) -> None:
    texts = [TEXT, "a \u2581 b", "", *TEXT.splitlines()[:50]]
    for tokenizer in exact.values():
        assert tokenizer.encode_batch(texts, num_threads=3) == [tokenizer.encode(text) for text in texts]


def test_special_ids_are_none_where_the_model_has_none(exact: dict[str, Tokenizer]) -> None:
    found = {name: (t.unk_id, t.bos_id, t.eos_id, t.pad_id) for name, t in exact.items()}
    assert found == {
        "bpe": (0, 1, 2, None),
        "unigram": (5, None, 3, 0),
        "char": (0, 1, None, None),
        "symbols": (None, 1, 2, None),
    }


def test_ids_cut_in_mid_character_decode_with_a_replacement(exact: dict[str, Tokenizer]) -> None:
    tokenizer = exact["bpe"]
    ids = tokenizer.encode("a\U0001f600b")
    assert tokenizer.decode([ids[0], *ids[2:]]).startswith("a\ufffd")


@pytest.mark.parametrize("bad", [-1, 600])
def test_an_id_outside_the_vocabulary_does_not_decode(exact: dict[str, Tokenizer], bad: int) -> None:
    with pytest.raises(DataError, match=f"token id {bad} is outside the vocabulary of 600"):
        exact["bpe"].decode([1, bad])


@pytest.mark.parametrize("name", EXACT)
def test_a_lone_surrogate_is_refused_with_its_place(exact: dict[str, Tokenizer], name: str) -> None:
    for encode in (exact[name].encode, lambda text: exact[name].encode_batch([text, "b"], num_threads=2)):
        with pytest.raises(DataError, match=r"character 4 of a text is the lone surrogate U\+D800"):
            encode("a b \ud800 c")


def test_a_character_model_without_bytes_tells_unknown_characters(tmp_path: Path) -> None:
    config = TokenizerTrainConfig(algorithm="char", bos_id=None, eos_id=None)
    tokenizer = train_tokenizer(["to be,\tor\nnot"], config, tmp_path / "char.model")
    assert tokenizer.vocab_size == len(set("to be,\tor\nnot")) + 1
    assert tokenizer.decode(tokenizer.encode("to be,\tor\nnot")) == "to be,\tor\nnot"
    assert tokenizer.decode(tokenizer.encode("to\u2581be q")) == "to\ufffdbe \ufffd"
    assert not tokenizer.is_exact


def test_a_fingerprint_is_of_the_content_not_of_the_file(exact: dict[str, Tokenizer], tmp_path: Path) -> None:
    for tokenizer in exact.values():
        tokenizer.save(tmp_path / "deeper" / "copy.model")
        assert Tokenizer.load(tmp_path / "deeper" / "copy.model").fingerprint == tokenizer.fingerprint
    assert len({tokenizer.fingerprint for tokenizer in exact.values()}) == len(exact)


def test_a_fingerprint_tells_settings_and_special_ids_apart(foreign: dict[str, bytes]) -> None:
    same = foreign_model()
    assert Tokenizer(same).fingerprint == Tokenizer(foreign["sentencepiece's defaults"]).fingerprint
    others = [foreign_model(bos_id=-1), foreign_model(add_dummy_prefix=False), foreign_model(pad_id=3)]
    assert len({Tokenizer(model).fingerprint for model in [same, *others]}) == 4


def test_an_imported_model_is_copied_and_works(foreign: dict[str, bytes], tmp_path: Path) -> None:
    source = tmp_path / "theirs.model"
    source.write_bytes(foreign["unigram"])
    imported = import_tokenizer(source, tmp_path / "ours" / "tokenizer.model")
    assert (imported.bos_id, imported.pad_id, imported.is_exact) == (None, 3, False)
    assert (tmp_path / "ours" / "tokenizer.model").read_bytes() == foreign["unigram"]


@given(junk=st.binary(max_size=200))
def test_bytes_that_are_no_model_are_refused(junk: bytes) -> None:
    with pytest.raises(DataError):
        Tokenizer(junk)


def test_a_missing_tokenizer_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.model cannot be read.*distft tokenizer train"):
        Tokenizer.load(tmp_path / "nowhere.model")
    (tmp_path / "text.model").write_text("not a model at all")
    with pytest.raises(DataError, match=r"text\.model: not a sentencepiece model"):
        Tokenizer.load(tmp_path / "text.model")


@pytest.mark.parametrize("name", [*EXACT, *FOREIGN])
def test_our_reading_of_the_model_file_agrees_with_sentencepiece(
    exact: dict[str, Tokenizer], foreign: dict[str, bytes], name: str
) -> None:
    model = exact[name].to_bytes() if name in exact else foreign[name]
    description, processor = Tokenizer(model).description, oracle(model)
    numbers = range(processor.get_piece_size())
    assert [p.text for p in description.pieces] == [processor.id_to_piece(i) for i in numbers]
    assert np.allclose([p.score for p in description.pieces], [processor.get_score(i) for i in numbers])
    assert [p.type.name == "BYTE" for p in description.pieces] == [processor.is_byte(i) for i in numbers]
    assert [p.type.name == "CONTROL" for p in description.pieces] == [
        processor.is_control(i) for i in numbers
    ]


def oracle(model: bytes) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=model)
