"""Hostile files of the tokenizers library: each ends in an error of distft, in little time and memory."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hostile.checkpoints import LFS_POINTER, NO_FILES
from hostile.guard import Guard, Outcome

READ = "hostile.readers:read_tokenizer"
UNK = {
    "type": "WordPiece",
    "unk_token": "u",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 9,
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def word_piece(**changes: Any) -> dict[str, Any]:
    model = {**UNK, "vocab": {"u": 0, "a": 1, "##b": 2}}
    return {"model": model, "added_tokens": [], "pre_tokenizer": {"type": "BertPreTokenizer"}, **changes}


def byte_bpe(vocab: Any = None, merges: Any = (), **changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2} if vocab is None else vocab, "merges": merges}
    return {"model": model, "added_tokens": [], "pre_tokenizer": BYTES, **changes}


def added(index: Any, content: Any, **flags: Any) -> dict[str, Any]:
    return {"added_tokens": [{"id": index, "content": content, "special": True, **flags}]}


def split(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, BYTES]}


def doubling(times: int) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": [step] * times}


def nested(depth: int) -> str:
    inner = '{"type": "Sequence", "pretokenizers": [' * depth + json.dumps(BYTES) + "]}" * depth
    return json.dumps(byte_bpe(pre_tokenizer=None)).replace(
        '"pre_tokenizer": null', f'"pre_tokenizer": {inner}'
    )


# name: content of tokenizer.json, words of the error
REFUSED: dict[str, tuple[Any, str]] = {
    "not_json": ("{", "is not JSON"),
    "a_list": ([], "not an object"),
    "deep": ("[" * 200_000, "nested too deeply"),
    "no_model": ({}, "it has no model"),
    "another_model": ({"model": {"type": "Unigram", "vocab": []}}, "its model is Unigram"),
    "sentencepiece_like_bpe": (
        byte_bpe(pre_tokenizer=None, normalizer={"type": "Prepend", "prepend": "\u2581"}),
        "BPE that is not byte-level",
    ),
    "a_step_of_no_kind": (byte_bpe(normalizer={"type": "Python"}), "its normalizer has a step 'Python'"),
    "a_step_that_is_a_list": (byte_bpe(pre_tokenizer=[BYTES]), "its pre_tokenizer is not as"),
    "steps_that_are_none": (byte_bpe(pre_tokenizer={"type": "Sequence"}), "no list of at most 32 steps"),
    "many_steps": (byte_bpe(normalizer=doubling(33)), "no list of at most 32 steps"),
    "deep_steps": (nested(60), "its pre_tokenizer is not as the library writes it"),
    "a_bomb": (byte_bpe(normalizer=doubling(30)), "can make a text 1.07e+09 times as long"),
    "a_long_pattern": (byte_bpe(pre_tokenizer=split("a" * 20_000)), "more than 16,384 characters"),
    "a_pattern_that_is_none": (byte_bpe(pre_tokenizer=split("(")), "the tokenizers library rejects it"),
    "deep_groups": (
        byte_bpe(pre_tokenizer=split("(" * 8000 + ")" * 8000)),
        "the tokenizers library rejects it",
    ),
    "no_vocabulary": (byte_bpe(vocab={}), "its model has no vocabulary"),
    "a_vocabulary_that_is_a_list": (byte_bpe(vocab=[["a", 0]]), "its model has no vocabulary"),
    "an_id_twice": (byte_bpe(vocab={"a": 0, "b": 0}), "two tokens of its vocabulary have the same id"),
    "a_negative_id": (byte_bpe(vocab={"a": -1}), "'-1' is not an id"),
    "a_boolean_id": (byte_bpe(vocab={"a": True, "b": 0}), "'True' is not an id"),
    "an_id_far_above": (byte_bpe(vocab={"a": 4_000_000_000}), "its greatest id is 4,000,000,000"),
    "an_id_beyond_32_bits": (byte_bpe(vocab={"a": 1 << 70}), "but it has only 1 tokens"),
    "half_a_character": (
        byte_bpe(vocab={"\ud83d": 0}),
        "lone surrogate",
    ),
    "merges_that_are_a_number": (byte_bpe(merges=7), "its model has no merges"),
    "a_merge_of_nothing": (byte_bpe(merges=["a z"]), "the merge 'a z' is of tokens that are not"),
    "a_merge_to_nothing": (byte_bpe(merges=["b a"]), "the merge 'b a' is of tokens that are not"),
    "a_merge_of_three": (byte_bpe(merges=["a b a"]), "not as transformers writes it"),
    "a_merge_of_numbers": (byte_bpe(merges=[[0, 1]]), "of tokens that are not in the vocabulary"),
    "no_unknown_token": (
        word_piece(model={**UNK, "vocab": {"a": 0}}),
        "unknown token 'u' is not in the vocab",
    ),
    "an_added_token_far_above": (byte_bpe(**added(1 << 31, "x")), "its greatest id is 2,147,483,648"),
    "an_added_token_after_a_gap": (byte_bpe(**added(9, "x")), "must follow the vocabulary without gaps"),
    "an_added_token_in_place_of_another": (byte_bpe(**added(1, "x")), "another id than 1"),
    "an_added_token_with_two_ids": (byte_bpe(**added(3, "a")), "has the id 3 and, in the vocabulary, 0"),
    "an_added_token_without_text": (byte_bpe(**added(3, "")), "is not a token's text"),
    "an_added_token_of_a_megabyte": (
        byte_bpe(**added(3, "x" * (1 << 20))),
        "a token has 1,048,576 characters",
    ),
    "an_added_token_that_is_a_text": (byte_bpe(added_tokens=["x"]), "not as transformers writes it"),
    "a_git_lfs_pointer": (LFS_POINTER, "is a git-LFS pointer"),
}
COMPANIONS: dict[str, tuple[str, Any, str]] = {
    "another_text": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"0": {"content": "x"}}},
        "another id",
    ),
    "no_id": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"x": {"content": "x"}}},
        "tokenizer_config.json",
    ),
    "a_number": ("special_tokens_map.json", {"eos_token": 7}, "'7' is not a token's text"),
    "not_json": ("added_tokens.json", "{", "added_tokens.json"),
    "far_above": ("added_tokens.json", {"x": 1 << 40}, "greatest id"),
    "a_pointer": ("tokenizer_config.json", LFS_POINTER, "is a git-LFS pointer"),
}


def read(guard: Guard, folder: Path) -> Outcome:
    outcome = guard.run(READ, str(folder), directories=[folder])
    outcome.check()
    assert outcome.added_mb < 250
    assert outcome.seconds < 10
    return outcome


def write(path: Path, content: Any) -> None:
    path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_tokenizer_json_is_refused(guard: Guard, tmp_path: Path, name: str) -> None:
    content, words = REFUSED[name]
    write(tmp_path / "tokenizer.json", content)
    outcome = read(guard, tmp_path)
    outcome.check_refused()
    assert words in outcome.message
    assert "tokenizer.json" in outcome.message
    assert len(outcome.message) < 1500


@pytest.mark.parametrize("name", COMPANIONS)
def test_a_hostile_file_beside_it_is_refused(guard: Guard, tmp_path: Path, name: str) -> None:
    file, content, words = COMPANIONS[name]
    write(tmp_path / "tokenizer.json", byte_bpe())
    write(tmp_path / file, content)
    outcome = read(guard, tmp_path)
    outcome.check_refused()
    assert words in outcome.message
    assert len(outcome.message) < 1500


@pytest.mark.parametrize("kind", NO_FILES)
def test_a_tokenizer_json_that_is_no_file_is_refused(guard: Guard, tmp_path: Path, kind: str) -> None:
    NO_FILES[kind](tmp_path / "tokenizer.json")
    read(guard, tmp_path).check_refused()


def test_a_tokenizer_json_of_a_sparse_gigabyte_is_not_read(guard: Guard, tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.json", byte_bpe())
    os.truncate(tmp_path / "tokenizer.json", 1 << 30)
    outcome = read(guard, tmp_path)
    outcome.check_refused()
    assert "more than a tokenizer's file can have" in outcome.message


@pytest.mark.parametrize("pattern", ["(a+)+$", "(x+x+)+y", "(a|a)*$"])
def test_a_pattern_that_backtracks_without_end_is_an_error_of_the_text(
    guard: Guard, tmp_path: Path, pattern: str
) -> None:
    """The library's search gives up after ten million steps, by a panic."""
    write(tmp_path / "tokenizer.json", byte_bpe(pre_tokenizer=split(pattern)))
    outcome = read(guard, tmp_path)
    outcome.check_refused()
    assert "the tokenizers library cannot encode a text of" in outcome.message


FINE: dict[str, Callable[[], dict[str, Any]]] = {
    "byte_bpe": lambda: byte_bpe(merges=["a b"]),
    "word_piece": word_piece,
    "auto_map": lambda: {**word_piece(), "auto_map": {"AutoTokenizer": ["code.Hostile", None]}},
    "truncation": lambda: {**word_piece(), "truncation": {"max_length": 0}, "padding": 7},
}


@pytest.mark.parametrize("name", FINE)
def test_a_tokenizer_that_is_not_hostile_is_read(guard: Guard, tmp_path: Path, name: str) -> None:
    write(tmp_path / "tokenizer.json", FINE[name]())
    write(tmp_path / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["code.Hostile", None]}})
    (tmp_path / "code.py").write_text("raise SystemExit('code of the tokenizer ran')\n")
    outcome = read(guard, tmp_path)
    assert outcome.returned is not None
    assert outcome.returned["vocab_size"] == 3
