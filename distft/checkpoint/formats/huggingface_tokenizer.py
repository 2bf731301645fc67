"""A sentencepiece model in the files that `AutoTokenizer.from_pretrained` loads, as plain JSON.

The ids are those of our `Tokenizer`, but for text in which a control piece such as `</s>` stands literally:
it becomes that piece's id, as everywhere in transformers. No bos or eos is added.
"""

import json
from typing import Any

from distft.tokenizer import Tokenizer
from distft.tokenizer.proto import Algorithm, ModelDescription, Piece, PieceType
from distft.tokenizer.words import SPACE

TOKENIZER_FILE = "tokenizer.model"

# Texts are cut here: a unigram model of theirs would take the text "<0x0A>" for the byte piece of that name.
_BYTE_PIECE = "<(?=0x[0-9A-F]{2}>)"
_SYMBOL_BONUS = 0.1  # a UTF-8 byte after the first: how sentencepiece 0.2.3 scores symbols, found by trial


def tokenizer_files(tokenizer: Tokenizer, *, max_seq_len: int) -> tuple[dict[str, bytes], list[str]]:
    """Files by name, and notes on what they cannot do.

    `tokenizer.model` is always among them; it is alone where no other form gives the same ids.
    """
    files = {TOKENIZER_FILE: tokenizer.to_bytes()}
    reasons = _inexpressible(tokenizer.description)
    if reasons:
        return files, [
            f"The tokenizer is written as {TOKENIZER_FILE} alone, as a tokenizer.json would give other ids: "
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
    if tokenizer.description.algorithm is Algorithm.UNIGRAM:
        notes.append(
            "The tokenizer is a unigram model: transformers adds its scores in float64 and sentencepiece in "
            "float32, so of nearly equal cuts, as in long runs of spaces, they may choose different ones."
        )
    return files, notes


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=1).encode()


def _inexpressible(model: ModelDescription) -> list[str]:
    """Why the tokenizers library has no model with these ids; empty where it has."""
    reasons = []
    if model.algorithm is Algorithm.WORD:
        reasons.append("it is a word model")
    if model.charsmap:
        reasons.append("it normalizes characters")
    if model.remove_extra_whitespaces:
        reasons.append("it removes spaces")
    if model.treat_whitespace_as_suffix or not model.escape_whitespaces:
        reasons.append("it treats spaces in a way of its own")
    if any(piece.type is PieceType.UNUSED for piece in model.pieces):
        reasons.append("it has unused pieces")
    if any("\udc80" <= character <= "\udcff" for piece in model.pieces for character in piece.text):
        reasons.append("it has pieces that are no UTF-8")
    if model.algorithm is Algorithm.BPE:
        reasons += _bpe_reasons(model)
    has_symbols = any(piece.type is PieceType.USER_DEFINED for piece in model.pieces)
    if model.add_dummy_prefix and has_symbols and model.algorithm is not Algorithm.UNIGRAM:
        reasons.append("it puts a space before texts, and has symbols of the user's")
    return reasons


def _bpe_reasons(model: ModelDescription) -> list[str]:
    normal = [piece for piece in model.pieces if piece.type is PieceType.NORMAL]
    characters = {piece.text for piece in normal if len(piece.text) == 1}
    merged = [piece for piece in normal if len(piece.text) > 1]
    reasons = []
    if len({piece.score for piece in merged}) < len(merged):
        reasons.append("pieces have equal scores")  # there the leftmost merges first, whatever it is
    if not all(characters.issuperset(piece.text) for piece in merged):
        reasons.append("it has pieces of characters that are none by themselves")
    return reasons


def _special_pieces(tokenizer: Tokenizer) -> dict[str, str]:
    pieces = tokenizer.description.pieces
    ids = {
        "unk": tokenizer.unk_id,
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
    }
    return {name: pieces[index].text for name, index in ids.items() if index is not None}


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    model = tokenizer.description
    is_unigram = model.algorithm is Algorithm.UNIGRAM
    prefix: list[dict[str, Any]] = [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ]
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if model.add_dummy_prefix:
        decoders = [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            *decoders,
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]
    cut = None
    if model.byte_fallback and is_unigram:
        cut = _BYTE_PIECE
    elif not model.byte_fallback and not model.add_dummy_prefix:
        cut = SPACE  # unknown, and for us no part of a run of unknown characters, which is one id
    split = {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": index,
                "content": _surface(piece, model),
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
        "pre_tokenizer": split if cut else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _unigram(tokenizer) if is_unigram else _bpe(tokenizer),
    }


def _is_added(piece: Piece, model: ModelDescription) -> bool:
    """Whether a piece is found in a text before the model sees it."""
    if piece.type is PieceType.USER_DEFINED:
        return model.algorithm is not Algorithm.UNIGRAM  # where they compete with the others by their score
    return piece.type in {PieceType.CONTROL, PieceType.UNKNOWN}


def _surface(piece: Piece, model: ModelDescription) -> str:
    """A piece as it stands in their vocabulary: with plain spaces, unless the text gets a space of its own.

    So a U+2581 in a text is a character like others, as it is for us.
    """
    if model.add_dummy_prefix or piece.type in {PieceType.CONTROL, PieceType.UNKNOWN}:
        return piece.text
    return piece.text.replace(SPACE, " ")


def _bpe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Byte pair encoding; without merges where the model is one of characters.

    sentencepiece merges any two neighbours that are a piece together, that of the highest score first. So
    each piece is a merge of all pairs that it can be cut into.
    """
    model = tokenizer.description
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
        merges = [[part.replace(SPACE, " ") for part in pair] for pair in merges]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _special_pieces(tokenizer).get("unk"),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {_surface(piece, model): index for index, piece in enumerate(model.pieces)},
        "merges": merges,
    }


def _unigram(tokenizer: Tokenizer) -> dict[str, Any]:
    model = tokenizer.description
    scores = [piece.score for piece in model.pieces if piece.type is PieceType.NORMAL]
    lowest = min(scores, default=0.0)

    def score(piece: Piece) -> float:
        if piece.type is PieceType.USER_DEFINED:
            return (len(piece.text.encode()) - 1) * _SYMBOL_BONUS
        # Pieces that no text has: not below the others, from the lowest of which theirs counts unknowns.
        return piece.score if piece.type is PieceType.NORMAL else lowest

    return {
        "type": "Unigram",
        "unk_id": tokenizer.unk_id,
        "byte_fallback": model.byte_fallback,
        "vocab": [[_surface(piece, model), score(piece)] for piece in model.pieces],
    }
