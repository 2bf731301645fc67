"""Converts a sentencepiece model to the files that transformers' `AutoTokenizer` loads.

The ids are those of distft's `Tokenizer`, except for the text of a control piece such as `</s>`, which
becomes that piece's id, as always in transformers. The export adds bos or eos to a text only when told so.
"""

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distft.tokenizer.companions import FINGERPRINT_KEY
from distft.tokenizer.files import CONFIG_FILE, LIBRARY_FILE, SENTENCEPIECE_FILE
from distft.tokenizer.model_proto import Algorithm, ModelProto, Piece, PieceType
from distft.tokenizer.pretokenization import META_SPACE

if TYPE_CHECKING:
    from distft.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

_NO_EOS = "In training a source ended with eos. Loaded from these files, the tokenizer adds none: append it."


def huggingface_files(
    tokenizer: "SentencePieceTokenizer",
    *,
    max_seq_len: int,
    pad_id: int | None = None,
    begins_with_bos: bool = False,
    ends_with_eos: bool = False,
) -> tuple[dict[str, bytes], list[str]]:
    """File contents by name, and notes on what is left out.

    `pad_id` is for a tokenizer without pad. With `begins_with_bos` transformers puts bos before each text,
    with `ends_with_eos` eos behind it.

    `tokenizer.model` is always included; it is the only file if a tokenizer.json would give other ids.
    """
    files = tokenizer.files()
    reasons = _unsupported_features(tokenizer.model_proto)
    if reasons:
        notes = [
            f"The tokenizer is written as {SENTENCEPIECE_FILE} only, as a {LIBRARY_FILE} would give other "
            f"ids: {'; '.join(reasons)}."
        ]
        return files, [*notes, *([_NO_EOS] if ends_with_eos else [])]
    tokenizer_json = _tokenizer_json(tokenizer)
    if begins_with_bos or ends_with_eos:
        tokenizer_json["post_processor"] = _template(
            tokenizer, before=("bos",) if begins_with_bos else (), behind=("eos",) if ends_with_eos else ()
        )
    files[LIBRARY_FILE] = _json(tokenizer_json)
    files[CONFIG_FILE] = _json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_seq_len,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            FINGERPRINT_KEY: tokenizer.fingerprint,
            "model_input_names": ["input_ids", "attention_mask"],
            **{f"{name}_token": piece for name, piece in _special_pieces(tokenizer, pad_id).items()},
        }
    )
    return files, []


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def _unsupported_features(model: ModelProto) -> list[str]:
    """Why no model of the tokenizers library gives the same ids; empty if one does."""
    reasons = []
    if model.algorithm is Algorithm.WORD:
        reasons.append("it is a word model")
    if model.algorithm is Algorithm.UNIGRAM:
        # They choose differently between segmentations of almost equal scores, as in long runs of spaces.
        reasons.append("it is a unigram model, whose scores transformers adds up in another precision")
    if model.precompiled_charsmap:
        reasons.append("it normalizes characters")
    if model.remove_extra_whitespaces:
        reasons.append("it removes spaces")
    if model.treat_whitespace_as_suffix or not model.escape_whitespaces:
        reasons.append("it treats spaces in an unusual way")
    if any(piece.type is PieceType.UNUSED for piece in model.pieces):
        reasons.append("it has unused pieces")
    if any("\udc80" <= character <= "\udcff" for piece in model.pieces for character in piece.text):
        reasons.append("it has pieces that are not UTF-8")
    if model.algorithm is Algorithm.BPE:
        reasons += _bpe_reasons(model)
    if model.add_dummy_prefix and _symbols(model) and not model.has_added_tokens:
        reasons.append("it adds a space before each text and has user-defined symbols")
    return reasons


def _symbols(model: ModelProto) -> list[str]:
    return [piece.text for piece in model.pieces if piece.type is PieceType.USER_DEFINED]


def _template(
    tokenizer: "SentencePieceTokenizer", *, before: Sequence[str], behind: Sequence[str]
) -> dict[str, Any]:
    """The part of a tokenizer.json that puts bos or eos around each text, of a pair behind each."""
    pieces = _special_pieces(tokenizer)
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    first, last = (
        [{"SpecialToken": {"id": pieces[role], "type_id": 0}} for role in roles] for roles in (before, behind)
    )
    texts = {name: {"Sequence": {"id": name, "type_id": 0}} for name in "AB"}
    return {
        "type": "TemplateProcessing",
        "single": [*first, texts["A"], *last],
        "pair": [*first, texts["A"], *last, texts["B"], *last],
        "special_tokens": {
            pieces[role]: {"id": pieces[role], "ids": [ids[role]], "tokens": [pieces[role]]}
            for role in (*before, *behind)
        },
    }


def _prefix(model: ModelProto) -> dict[str, Any]:
    """The normalizer that puts a space before a text, unless it begins with an added token."""
    if not (model.has_added_tokens and _symbols(model)):
        return {"type": "Prepend", "prepend": META_SPACE}
    symbols = "|".join(re.escape(text.replace(META_SPACE, " ")) for text in _symbols(model))
    pattern = {"Regex": rf"\A(?=[\s\S])(?!{symbols})"}
    return {"type": "Replace", "pattern": pattern, "content": META_SPACE}


def _bpe_reasons(model: ModelProto) -> list[str]:
    normal = [piece for piece in model.pieces if piece.type is PieceType.NORMAL]
    characters = {piece.text for piece in normal if len(piece.text) == 1}
    merged = [piece for piece in normal if len(piece.text) > 1]
    reasons = []
    if len({piece.score for piece in merged}) < len(merged):
        reasons.append("pieces have equal scores")  # sentencepiece then merges the leftmost pair first
    if not all(characters.issuperset(piece.text) for piece in merged):
        reasons.append("it has pieces with characters that are not pieces themselves")
    return reasons


def _special_pieces(tokenizer: "SentencePieceTokenizer", pad_id: int | None = None) -> dict[str, str]:
    pieces = tokenizer.model_proto.pieces
    ids = {
        "unk": tokenizer.unk_id,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": pad_id if tokenizer.pad_id is None else tokenizer.pad_id,
    }
    return {name: pieces[index].text for name, index in ids.items() if index is not None}


def _tokenizer_json(tokenizer: "SentencePieceTokenizer") -> dict[str, Any]:
    model = tokenizer.model_proto
    special_ids = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    prefix: list[dict[str, Any]] = [
        _prefix(model),
        {"type": "Replace", "pattern": {"String": " "}, "content": META_SPACE},
    ]
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.add_dummy_prefix:
        decoders = [
            {"type": "Replace", "pattern": {"String": META_SPACE}, "content": " "},
            *decoders,
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]
    # A run of unknown characters is one id, but in sentencepiece a META_SPACE does not join such a run.
    is_split = not model.byte_fallback and not model.add_dummy_prefix
    split = {"type": "Split", "pattern": {"Regex": META_SPACE}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": _vocabulary_text(piece, model),
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                # Of a model that adds a space, tokens are looked for where it has been added.
                "normalized": piece.type is PieceType.USER_DEFINED and model.add_dummy_prefix,
                "special": piece.type is not PieceType.USER_DEFINED or index in special_ids,
            }
            for index, piece in enumerate(model.pieces)
            if _is_added(piece)
        ],
        "normalizer": {"type": "Sequence", "normalizers": prefix} if model.add_dummy_prefix else None,
        "pre_tokenizer": split if is_split else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokenizer),
    }


def _is_added(piece: Piece) -> bool:
    """Whether the tokenizers library must match the piece in a text before its model runs."""
    return piece.type in {PieceType.USER_DEFINED, PieceType.CONTROL, PieceType.UNKNOWN}


def _vocabulary_text(piece: Piece, model: ModelProto) -> str:
    """A piece's entry in the tokenizers library's vocabulary: with plain spaces, unless a prefix is added.

    So a U+2581 in a text remains an ordinary character, as in sentencepiece.
    """
    if model.add_dummy_prefix or piece.type in {PieceType.CONTROL, PieceType.UNKNOWN}:
        return piece.text
    return piece.text.replace(META_SPACE, " ")


def _bpe(tokenizer: "SentencePieceTokenizer") -> dict[str, Any]:
    """The `model` entry of a BPE or, without merges, a character model.

    sentencepiece merges any two neighbours that form a piece, the one with the highest score first. So every
    pair that a piece can be split into is a merge.
    """
    model = tokenizer.model_proto
    merges: list[list[str]] = []
    if model.algorithm is Algorithm.BPE:
        normal = [piece for piece in model.pieces if piece.type is PieceType.NORMAL]
        known = {piece.text for piece in normal}
        for piece in sorted(normal, key=lambda piece: -piece.score):
            for cut in range(1, len(piece.text)):
                left, right = piece.text[:cut], piece.text[cut:]
                if left in known and right in known:
                    merges.append([left, right])
    if not model.add_dummy_prefix:
        merges = [[text.replace(META_SPACE, " ") for text in pair] for pair in merges]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _special_pieces(tokenizer).get("unk"),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {_vocabulary_text(piece, model): index for index, piece in enumerate(model.pieces)},
        "merges": merges,
    }
