"""Reads the files beside a sentencepiece model of transformers that carry more ids, as of ChatML."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distft import storage
from distft.errors import DataError
from distft.storage import AnyPath
from distft.tokenizer.files import (
    ADDED_TOKENS,
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    LIBRARY_FILE,
    SPECIAL_MAP,
    json_object,
    read_bounded,
)
from distft.tokenizer.model_proto import SPECIAL_NAMES

FINGERPRINT_KEY = "distft_tokenizer"  # in an export's tokenizer_config.json: of the model beside it


@dataclass(kw_only=True, slots=True)
class Companions:
    """What the files beside a model say about its vocabulary."""

    tokens: dict[int, str] = field(default_factory=dict)  # id -> text
    special: dict[str, str] = field(default_factory=dict)  # bos, eos, pad -> text
    vocabulary: dict[str, int] | None = None  # of tokenizer.json
    names: list[str] = field(default_factory=list)  # of the files that were read
    fingerprint: str | None = None  # of the model, if distft wrote the files for it
    adds_bos: bool | None = None  # whether transformers puts bos before a text; None: they do not say
    stripping: list[str] = field(default_factory=list)  # tokens that take the white space beside them
    template_files: dict[str, bytes] = field(default_factory=dict)  # those that may have a chat template


def read_companions(directory: AnyPath) -> Companions:
    """Read the files in `directory`; those that are missing say nothing. Raises `DataError` for bad ones."""
    found = Companions()
    for name in (LIBRARY_FILE, CONFIG_FILE, SPECIAL_MAP, ADDED_TOKENS, CHAT_TEMPLATE_FILE):
        path = storage.join(directory, name)
        data = read_bounded(path)
        if data is None:
            continue
        if name in {CONFIG_FILE, CHAT_TEMPLATE_FILE}:
            found.template_files[name] = data
        if name == CHAT_TEMPLATE_FILE:
            continue  # says nothing of the vocabulary
        found.names.append(name)
        raw = json_object(path, data)
        try:
            _READERS[name](raw, found)
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise DataError(
                f"{path} is not as transformers writes it: {str(error) or type(error).__name__}."
            ) from None
    return found


def _read_tokenizer_json(raw: dict[str, Any], found: Companions) -> None:
    vocabulary = raw.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # of a unigram model: [[text, score], ...]
        vocabulary = {text: index for index, (text, _) in enumerate(vocabulary)}
    found.vocabulary = {checked_text(text): checked_id(index) for text, index in vocabulary.items()}
    steps = (raw.get("post_processor") or {}).get("single") or [{}]
    found.adds_bos = "SpecialToken" in steps[0]
    for token in raw.get("added_tokens") or []:
        _add(found, token["id"], token["content"], token)


def _read_tokenizer_config(raw: dict[str, Any], found: Companions) -> None:
    for index, token in (raw.get("added_tokens_decoder") or {}).items():
        _add(found, int(index), token["content"], token)
    _read_special(raw, found)
    found.fingerprint = raw.get(FINGERPRINT_KEY)
    adds_bos = raw.get("add_bos_token")
    if isinstance(adds_bos, bool):
        found.adds_bos = adds_bos
    elif str(raw.get("tokenizer_class")).startswith("Llama"):
        found.adds_bos = True


def _read_special(raw: dict[str, Any], found: Companions) -> None:
    for name in SPECIAL_NAMES:
        token = raw.get(f"{name}_token")
        if token is not None and name not in found.special:
            found.special[name] = checked_text(token["content"] if isinstance(token, dict) else token)


def _read_added_tokens(raw: dict[str, Any], found: Companions) -> None:
    for text, index in raw.items():
        _add(found, index, text, {})


_READERS = {
    LIBRARY_FILE: _read_tokenizer_json,
    CONFIG_FILE: _read_tokenizer_config,
    SPECIAL_MAP: _read_special,
    ADDED_TOKENS: _read_added_tokens,
}


def _add(found: Companions, index: Any, text: Any, settings: Mapping[str, Any]) -> None:
    known = found.tokens.setdefault(checked_id(index), checked_text(text))
    if known != text:
        raise ValueError(f"id {index} is {text[:40]!r}, but {known[:40]!r} in another file beside it")
    if (
        any(settings.get(name) for name in ("lstrip", "rstrip", "single_word"))
        and text not in found.stripping
    ):
        found.stripping.append(text)


def checked_id(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is not an id")
    return value


def checked_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{str(value)[:40]!r} is not a token's text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{value[:40]!r} has a lone surrogate, half a character") from None
    return value
