"""Checks a tokenizer.json before the tokenizers library, which is native code, gets it.

The file is not trusted. Only the parts that WordPiece and byte-level BPE need are let through, with bounds
on their number and on how much a normalizer can lengthen a text.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distft.errors import DataError
from distft.tokenizer.companions import checked_id, checked_text

Kind = Literal["wordpiece", "byte_bpe"]
UNKNOWN_KIND = (
    "WordPiece (BERT) and byte-level BPE (GPT-2, RoBERTa, Llama 3, Qwen) can be read from such a file. For a "
    "model of the Llama 2, Mistral or T5 kind, get the tokenizer.model that was published with it and name "
    "that: the tokens that the .json adds are then used too."
)

_MAX_TOKENS = 1 << 22  # 16 times the largest vocabularies in use
_MAX_TOKEN_BYTES = 1 << 16
_MAX_GAP = 1024  # ids without a token
_MAX_STEPS = 32  # of a normalizer, pre-tokenizer or decoder
_MAX_PATTERN_CHARS = 1 << 14
_MAX_GROWTH = 64  # of a text in the normalizer
_NORMALIZERS = {
    "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Strip",
    "StripAccents",
}  # fmt: skip
_PRE_TOKENIZERS = {
    "BertPreTokenizer", "ByteLevel", "Digits", "Punctuation", "Split", "Whitespace", "WhitespaceSplit",
}  # fmt: skip
_DECODERS = {"ByteFallback", "ByteLevel", "Fuse", "Replace", "Strip", "WordPiece"}
_PARTS = {
    "normalizer": ("normalizers", _NORMALIZERS),
    "pre_tokenizer": ("pretokenizers", _PRE_TOKENIZERS),
    "decoder": ("decoders", _DECODERS),
}


class UnknownKindError(DataError):
    """A tokenizer.json of another kind than the supported ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LibraryModel:
    """What a tokenizer.json says."""

    kind: Kind
    vocabulary: Mapping[str, int]  # of the model
    added: dict[int, dict[str, Any]]  # tokens that are found in a text before it is encoded, by id
    unk_token: str | None
    prefix: str  # of a piece within a word, for WordPiece
    normalizers: list[dict[str, Any]]
    pre_tokenizers: list[dict[str, Any]]
    has_dropout: bool


def parse_library_json(raw: Mapping[str, Any]) -> LibraryModel:
    """Raises `UnknownKindError`, or `ValueError`, `TypeError` or a like error for what is none."""
    model = raw.get("model")
    if not isinstance(model, dict):
        raise UnknownKindError(f"it has no model. {UNKNOWN_KIND}")
    steps = {part: list(_steps(raw.get(part), part, *_PARTS[part])) for part in _PARTS}
    kind = _kind(model, steps)
    vocabulary = _vocabulary(model)
    unk = model.get("unk_token")
    if kind == "byte_bpe":
        _check_merges(model, vocabulary)
    elif not isinstance(unk, str) or unk not in vocabulary:
        raise ValueError(f"its unknown token {unk!r:.40} is not in the vocabulary")
    _check_growth(steps["normalizer"])
    added: dict[int, dict[str, Any]] = {}
    for token in raw.get("added_tokens") or []:
        add_token(added, token["id"], token["content"], token)
    return LibraryModel(
        kind=kind,
        vocabulary=vocabulary,
        added=added,
        unk_token=None if unk is None else checked_text(unk),
        prefix=_text_or(model.get("continuing_subword_prefix"), "##") if kind == "wordpiece" else "",
        normalizers=steps["normalizer"],
        pre_tokenizers=steps["pre_tokenizer"],
        has_dropout=bool(model.get("dropout")),
    )


def add_token(added: dict[int, dict[str, Any]], index: Any, text: Any, flags: Mapping[str, Any]) -> None:
    """Add a token to `added`; later flags count. Raises `ValueError` if its id has another text."""
    known = added.get(checked_id(index))
    if known is not None and known["content"] != text:
        raise ValueError(f"id {index} is {text!r:.40}, but {known['content']!r:.40} elsewhere")
    if len(added) == _MAX_TOKENS:
        raise ValueError(f"it adds more than {_MAX_TOKENS:,} tokens")
    special = bool(flags.get("special", True))
    added[index] = {
        "id": index,
        "content": _bounded(checked_text(text)),
        "single_word": bool(flags.get("single_word")),
        "lstrip": bool(flags.get("lstrip")),
        "rstrip": bool(flags.get("rstrip")),
        "normalized": bool(flags.get("normalized", not special)),
        "special": special,
    }


def vocabulary_size(vocabulary: Mapping[str, int], added: Mapping[int, Any]) -> int:
    """One more than the greatest id. Raises `ValueError` for ids that are far apart or given twice."""
    size = max([*vocabulary.values(), *added], default=-1) + 1
    ids = {*vocabulary.values(), *added}
    if size > len(ids) + _MAX_GAP:
        raise ValueError(f"its greatest id is {size - 1:,}, but it has only {len(ids):,} tokens")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("two tokens of its vocabulary have the same id")
    for index, token in added.items():
        own = vocabulary.get(token["content"], index)
        if own != index:
            raise ValueError(f"{token['content']!r:.40} has the id {index} and, in the vocabulary, {own}")
    return size


def _kind(model: Mapping[str, Any], steps: Mapping[str, list[dict[str, Any]]]) -> Kind:
    name = model.get("type")
    if name is None:  # older files leave it out
        name = "BPE" if "merges" in model else "WordPiece" if "max_input_chars_per_word" in model else None
    if name == "WordPiece":
        return "wordpiece"
    is_byte_level = any(step["type"] == "ByteLevel" for part in _PARTS for step in steps[part])
    is_plain = not any(
        model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    )
    if name == "BPE" and is_byte_level and is_plain:
        return "byte_bpe"
    what = "BPE that is not byte-level" if name == "BPE" else str(name)
    raise UnknownKindError(f"its model is {what:.40}. {UNKNOWN_KIND}")


def _steps(part: Any, name: str, key: str, allowed: set[str], depth: int = 0) -> Iterator[dict[str, Any]]:
    """The steps of a part, with those of sequences one after another. Raises for more than are possible."""
    if part is None:
        return
    if not isinstance(part, dict) or depth > _MAX_STEPS:
        raise ValueError(f"its {name} is not as the library writes it")
    kind = part.get("type")
    if kind == "Sequence":
        steps = part.get(key)
        if not isinstance(steps, list) or len(steps) > _MAX_STEPS:
            raise ValueError(f"its {name} has no list of at most {_MAX_STEPS} steps")
        for step in steps:
            yield from _steps(step, name, key, allowed, depth + 1)
    elif kind in allowed:
        _check_pattern(part, name)
        yield part
    else:
        raise UnknownKindError(f"its {name} has a step {kind!r:.40}. {UNKNOWN_KIND}")


def _check_pattern(step: Mapping[str, Any], name: str) -> None:
    pattern = step.get("pattern")
    texts = list(pattern.values()) if isinstance(pattern, dict) else [pattern]
    texts.append(step.get("content"))
    if any(isinstance(text, str) and len(text) > _MAX_PATTERN_CHARS for text in texts):
        raise ValueError(f"its {name} has a pattern of more than {_MAX_PATTERN_CHARS:,} characters")


def _check_growth(steps: list[dict[str, Any]]) -> None:
    """Raise `ValueError` for replacements that can lengthen a text much, one after another."""
    growth = 1.0
    for step in steps:
        if step["type"] not in {"Replace", "Prepend"}:
            continue
        content = _text_or(step.get("content", step.get("prepend")), "")
        pattern = step.get("pattern")
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        length = len(literal.encode()) if isinstance(literal, str) and literal else 1
        growth *= max(1.0, len(content.encode()) / length)
    if growth > _MAX_GROWTH:
        raise ValueError(f"its normalizer can make a text {growth:.3g} times as long")


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ValueError("its model has no vocabulary")
    if len(vocabulary) > _MAX_TOKENS:
        raise ValueError(f"it has more than {_MAX_TOKENS:,} tokens")
    return {_bounded(text): checked_id(index) for text, index in vocabulary.items()}


def _check_merges(model: Mapping[str, Any], vocabulary: Mapping[str, int]) -> None:
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ValueError("its model has no merges")
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if not (left in vocabulary and right in vocabulary and left + right in vocabulary):
            raise ValueError(f"the merge {merge!r:.60} is of tokens that are not in the vocabulary")


def _bounded(text: Any) -> str:
    if text == "":
        return ""
    if len(checked_text(text)) > _MAX_TOKEN_BYTES:
        raise ValueError(f"a token has {len(text):,} characters")
    return str(text)


def _text_or(value: Any, default: str) -> str:
    return value if isinstance(value, str) else default
