"""Converts a sentencepiece model to the files that transformers' `AutoTokenizer` loads.

The ids are those of distft's `Tokenizer`, except for the text of a control piece such as `</s>`, which
becomes that piece's id, as always in transformers. The export adds no bos or eos to a text.
"""

import json
from typing import Any

from distft.tokenizer import Tokenizer
from distft.tokenizer.model_proto import Algorithm, ModelProto, Piece, PieceType
from distft.tokenizer.pretokenization import META_SPACE

TOKENIZER_FILE = "tokenizer.model"

# Split texts here: the tokenizers library's unigram model would match the text "<0x0A>" to the byte piece.
_BYTE_PIECE_START = "<(?=0x[0-9A-F]{2}>)"
_SYMBOL_BONUS = 0.1  # score per UTF-8 byte after the first of a symbol; measured with sentencepiece 0.2.3


def tokenizer_files(tokenizer: Tokenizer, *, max_seq_len: int) -> tuple[dict[str, bytes], list[str]]:
    """File contents by name, and notes on how transformers' ids may differ.

    `tokenizer.model` is always included; it is the only file if a tokenizer.json would give other ids.
    """
    files = {TOKENIZER_FILE: tokenizer.to_bytes()}
    reasons = _unsupported_features(tokenizer.model_proto)
    if reasons:
        return files, [
            f"The tokenizer is written as {TOKENIZER_FILE} only, as a tokenizer.json would give other ids: "
            f"{'; '.join(reasons)}."
        ]
    files["tokenizer.json"] = _json(_tokenizer_json(tokenizer))
    files["tokenizer_config.json"] = _json(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_seq_len,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            **{f"{name}_token": piece for name, piece in _special_pieces(tokenizer).items()},
        }
    )
    notes = []
    if tokenizer.model_proto.algorithm is Algorithm.UNIGRAM:
        notes.append(
            "The tokenizer is a unigram model. transformers adds scores in float64, sentencepiece in "
            "float32, so ids may differ where two segmentations have almost equal scores, as in long runs of "
            "spaces."
        )
    return files, notes


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def _unsupported_features(model: ModelProto) -> list[str]:
    """Why no model of the tokenizers library gives the same ids; empty if one does."""
    reasons = []
    if model.algorithm is Algorithm.WORD:
        reasons.append("it is a word model")
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
    has_symbols = any(piece.type is PieceType.USER_DEFINED for piece in model.pieces)
    if model.add_dummy_prefix and has_symbols and model.algorithm is not Algorithm.UNIGRAM:
        reasons.append("it adds a space before each text and has user-defined symbols")
    return reasons


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


def _special_pieces(tokenizer: Tokenizer) -> dict[str, str]:
    pieces = tokenizer.model_proto.pieces
    ids = {
        "unk": tokenizer.unk_id,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
    }
    return {name: pieces[index].text for name, index in ids.items() if index is not None}


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    model = tokenizer.model_proto
    is_unigram = model.algorithm is Algorithm.UNIGRAM
    prefix: list[dict[str, Any]] = [
        {"type": "Prepend", "prepend": META_SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": META_SPACE},
    ]
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.add_dummy_prefix:
        decoders = [
            {"type": "Replace", "pattern": {"String": META_SPACE}, "content": " "},
            *decoders,
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]
    split_at = None
    if model.byte_fallback and is_unigram:
        split_at = _BYTE_PIECE_START
    elif not model.byte_fallback and not model.add_dummy_prefix:
        # A run of unknown characters is one id, but in sentencepiece a META_SPACE does not join such a run.
        split_at = META_SPACE
    split = {"type": "Split", "pattern": {"Regex": split_at}, "behavior": "Isolated", "invert": False}
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
                "normalized": False,
                "special": piece.type is not PieceType.USER_DEFINED,
            }
            for index, piece in enumerate(model.pieces)
            if _is_added(piece, model)
        ],
        "normalizer": {"type": "Sequence", "normalizers": prefix} if model.add_dummy_prefix else None,
        "pre_tokenizer": split if split_at else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _unigram(tokenizer) if is_unigram else _bpe(tokenizer),
    }


def _is_added(piece: Piece, model: ModelProto) -> bool:
    """Whether the tokenizers library must match the piece in a text before its model runs."""
    if piece.type is PieceType.USER_DEFINED:
        return model.algorithm is not Algorithm.UNIGRAM  # a unigram model scores symbols like other pieces
    return piece.type in {PieceType.CONTROL, PieceType.UNKNOWN}


def _vocabulary_text(piece: Piece, model: ModelProto) -> str:
    """A piece's entry in the tokenizers library's vocabulary: with plain spaces, unless a prefix is added.

    So a U+2581 in a text remains an ordinary character, as in sentencepiece.
    """
    if model.add_dummy_prefix or piece.type in {PieceType.CONTROL, PieceType.UNKNOWN}:
        return piece.text
    return piece.text.replace(META_SPACE, " ")


def _bpe(tokenizer: Tokenizer) -> dict[str, Any]:
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


def _unigram(tokenizer: Tokenizer) -> dict[str, Any]:
    """The `model` entry of a unigram model."""
    model = tokenizer.model_proto
    scores = [piece.score for piece in model.pieces if piece.type is PieceType.NORMAL]
    lowest = min(scores, default=0.0)

    def score(piece: Piece) -> float:
        if piece.type is PieceType.USER_DEFINED:
            return (len(piece.text.encode()) - 1) * _SYMBOL_BONUS
        # No text contains these pieces. Their score must not be below the others: the tokenizers library
        # derives the score of unknown characters from the lowest.
        return piece.score if piece.type is PieceType.NORMAL else lowest

    return {
        "type": "Unigram",
        "unk_id": tokenizer.unk_id,
        "byte_fallback": model.byte_fallback,
        "vocab": [[_vocabulary_text(piece, model), score(piece)] for piece in model.pieces],
    }
