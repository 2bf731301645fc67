"""Encodes and decodes with the tokenizers library: WordPiece and byte-level BPE. Its only importer."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from distft import storage
from distft.errors import ConfigError, DataError
from distft.tokenizer.files import (
    ADDED_TOKENS,
    CHAT_TEMPLATE_FILE,
    CONFIG_FILE,
    LIBRARY_FILE,
    SPECIAL_MAP,
    json_object,
)
from distft.tokenizer.interface import Tokenizer, check_text
from distft.tokenizer.library_json import LibraryModel, add_token, parse_library_json, vocabulary_size
from distft.tokenizer.special_tokens import SpecialTokens, begins_with_special_token
from distft.tokenizer.template_files import templates_of_files

_LONG_TEXT = 1 << 14  # characters from which encoding without offsets, in the library's thread, is faster
_NORMALIZER_SETTINGS = {  # of tokenizer_config.json, and their names in a BertNormalizer
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}
_WHITE_SPACE = b" \t\n\r"
_REMOVES_TEXT = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}


class LibraryTokenizer(Tokenizer):
    """A tokenizer.json with the files beside it, as transformers applies them.

    As there, a special token's text in a text becomes the token, and truncation and padding are left to the
    caller.
    """

    file_name = LIBRARY_FILE

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """`files`: contents by name. Raises `DataError` for damaged or unsupported ones."""
        self._files = dict(files)
        tokens = _read_companions(files)
        raw = json_object(LIBRARY_FILE, files[LIBRARY_FILE])
        with _file_errors(LIBRARY_FILE):
            model = parse_library_json(raw)
            for token in tokens.added.values():
                add_token(model.added, token["id"], token["content"], token)
            known = {**model.vocabulary, **{token["content"]: i for i, token in model.added.items()}}
            texts = tokens.resolved(known)
            found = {token["content"] for token in model.added.values()}
            for text in sorted({*texts.values()} - found):  # as transformers makes them tokens of their own
                add_token(model.added, known[text], text, {})
            self.vocab_size = vocabulary_size(model.vocabulary, model.added)
            _apply_settings(raw, model, tokens.settings)
            self._adds_special = begins_with_special_token(raw.get("post_processor"))
        self._model = model
        self.chat_templates = templates_of_files(files)
        self._special_texts = {f"{role}_token": t for role, t in texts.items() if tokens.texts.get(role, t)}
        self._set_special_ids(texts, known)
        self._raw = _loadable(raw, model)
        self._backend = _load(self._raw, model)
        adds_bos = tokens.settings.get("add_bos_token")
        self.adds_bos = self.bos_id is not None and (
            adds_bos if isinstance(adds_bos, bool) else self._adds_special
        )
        self.is_lossless = _is_lossless(model)
        self.notes = tuple(_notes(raw, model, tokens.unknown(known)))

    def _set_special_ids(self, texts: Mapping[str, str], known: Mapping[str, int]) -> None:
        ids = {role: known[text] for role, text in texts.items()}
        self.bos_id, self.eos_id, self.pad_id = ids.get("bos"), ids.get("eos"), ids.get("pad")
        self._control_ids = frozenset(ids[r] for r in ("bos", "eos", "pad", "cls", "sep") if r in ids)
        unk = ids.get("unk")
        if self._model.unk_token is not None:
            unk = known.get(self._model.unk_token)
        # GPT-2 calls its end of a text unknown too; no text encodes to that, and nothing should mean both.
        self.unk_id = None if unk in self._control_ids else unk

    @cached_property
    def fingerprint(self) -> str:
        special_ids = [self.bos_id, self.eos_id, self.pad_id, self.unk_id]
        digest = hashlib.blake2b(digest_size=16)
        for part in (*_canonical(self._raw), special_ids):
            digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    def save(self, path: str | Path) -> None:
        """Write the files into the directory at `path`, or beside `path` if that is a `tokenizer.json`."""
        name = str(path).rstrip("/").rpartition("/")[2]
        if name != LIBRARY_FILE and "." in name:
            raise ConfigError(
                f"{path}: this tokenizer consists of {', '.join(self._files)}: name a directory for them."
            )
        directory = storage.parent(path) if name == LIBRARY_FILE else path
        try:
            for file, data in self._files.items():
                storage.commit_bytes(storage.join(directory, file), data)
        except OSError as error:
            raise DataError(f"tokenizer cannot be written to {path}: {error}.") from error

    def encode_array(self, text: str) -> NDArray[np.int32]:
        try:
            if len(text) < _LONG_TEXT:
                ids = self._backend.encode(text, add_special_tokens=False).ids
            else:
                ids = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as error:
            check_text(text)
            _raise_data_error(
                error, f"the tokenizers library cannot encode a text of {len(text):,} characters"
            )
        return np.array(ids, dtype=np.int32)

    def encode_with_offsets(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        except BaseException as error:
            check_text(text)
            _raise_data_error(
                error, f"the tokenizers library cannot encode a text of {len(text):,} characters"
            )
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    @property
    def special_texts(self) -> Mapping[str, str]:
        return self._special_texts

    def with_chat_template(self, source: str) -> Self:
        tokenizer = super().with_chat_template(source)
        tokenizer._files = {**self._files, CHAT_TEMPLATE_FILE: source.encode()}
        return tokenizer

    def _decode(self, ids: list[int]) -> str:
        shown = [index for index in ids if index not in self._control_ids]
        try:
            text: str = self._backend.decode(shown, skip_special_tokens=False)
        except BaseException as error:
            _raise_data_error(error, f"the tokenizers library cannot decode {len(ids):,} ids")
        return text

    def token_bytes(self) -> NDArray[np.int64]:
        without_text = {*self._control_ids, self.unk_id}
        lengths = [0 if i in without_text else len(s) for i, s in enumerate(self._surfaces)]
        return np.array(lengths, dtype=np.int64)

    def starts_word(self) -> NDArray[np.bool_]:
        added, prefix = self._model.added, self._model.prefix
        if self._model.kind == "wordpiece":
            starts = [i in added or not text.startswith(prefix) for i, text in enumerate(self.piece_texts)]
        else:
            starts = [i in added or surface[:1] in _SPACES for i, surface in enumerate(self._surfaces)]
        return np.array(starts, dtype=np.bool_)

    def piece_id(self, piece: str) -> int | None:
        if piece in self._ids or self._model.kind == "wordpiece":
            return self._ids.get(piece)
        return self._ids.get("".join(_CHARACTERS[byte] for byte in piece.encode("utf-8", "replace")))

    @cached_property
    def piece_texts(self) -> Sequence[str]:
        texts = [""] * self.vocab_size
        for text, index in self._ids.items():
            texts[index] = text
        return texts

    def padding_id(self) -> int | None:
        return next((i for i in (self.pad_id, self.eos_id, self.bos_id) if i is not None), None)

    def huggingface_files(
        self,
        *,
        max_seq_len: int,  # noqa: ARG002
        pad_id: int | None = None,  # noqa: ARG002
        begins_with_bos: bool = False,
        ends_with_eos: bool = False,
    ) -> tuple[Mapping[str, bytes], list[str]]:
        """The files as they were read. `max_seq_len` and `pad_id` are not written into them."""
        notes = []
        if begins_with_bos != self.adds_bos:
            notes.append(
                f"The tokenizer's files are written as they were read: with them transformers puts "
                f"{'bos' if self.adds_bos else 'no bos'} before a text, which training did "
                f"{'not do' if self.adds_bos else 'do'}."
            )
        if ends_with_eos and self._backend.encode("a", add_special_tokens=True).ids[-1:] != [self.eos_id]:
            notes.append(
                "The tokenizer's files are written as they were read: with them transformers puts no eos "
                "behind a text, with which a source ended in training. Append it."
            )
        return self.files(), notes

    @cached_property
    def _ids(self) -> dict[str, int]:
        added = {token["content"]: index for index, token in self._model.added.items()}
        return {**self._model.vocabulary, **added}

    @cached_property
    def _surfaces(self) -> list[bytes]:
        added = self._model.added
        return [
            text.encode() if index in added else _surface(text, self._model)
            for index, text in enumerate(self.piece_texts)
        ]


def _surface(text: str, model: LibraryModel) -> bytes:
    if model.kind == "wordpiece":
        return text.removeprefix(model.prefix).encode()
    try:
        return bytes([_BYTES[character] for character in text])
    except KeyError:
        return text.encode()  # not of the alphabet of bytes: the library's decoder shows it as it is


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable character for each byte (`bytes_to_unicode` in its encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + n) for n, b in enumerate(others)}}


_CHARACTERS = _byte_alphabet()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}
_SPACES = frozenset(_WHITE_SPACE[i : i + 1] for i in range(len(_WHITE_SPACE)))


def _read_companions(files: Mapping[str, bytes]) -> SpecialTokens:
    tokens = SpecialTokens()
    for name in (CONFIG_FILE, SPECIAL_MAP, ADDED_TOKENS):
        if name not in files:
            continue
        raw = json_object(name, files[name])
        with _file_errors(name):
            if name == ADDED_TOKENS:
                tokens.read_added(raw)
            else:
                tokens.read(raw)
        if name == CONFIG_FILE:
            tokens.settings = raw
    return tokens


def _apply_settings(raw: Mapping[str, Any], model: LibraryModel, settings: Mapping[str, Any]) -> None:
    """Change the steps of `raw` as transformers does where tokenizer_config.json says otherwise."""
    for step in model.normalizers:
        if step["type"] == "BertNormalizer":
            step.update({own: settings[key] for key, own in _NORMALIZER_SETTINGS.items() if key in settings})
    prefix = settings.get("add_prefix_space")
    for step in model.pre_tokenizers:
        if step["type"] == "ByteLevel" and isinstance(prefix, bool):
            step["add_prefix_space"] = prefix
    if model.kind == "byte_bpe" and raw.get("decoder") is None and isinstance(raw, dict):
        raw["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}


def _loadable(raw: Mapping[str, Any], model: LibraryModel) -> dict[str, Any]:
    """What the library gets: without truncation, padding, dropout and special tokens around a text."""
    unused = {"truncation": None, "padding": None, "post_processor": None}
    added = [model.added[index] for index in sorted(model.added)]
    return {
        "version": "1.0",
        **unused,
        "added_tokens": added,
        **{part: raw.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")},
        "model": {**raw["model"], "dropout": None} if model.kind == "byte_bpe" else raw["model"],
    }


def _load(raw: Mapping[str, Any], model: LibraryModel) -> Any:
    import tokenizers  # settings of tokenizers are checked without it

    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(raw))
        wrong = [t for i, t in model.added.items() if backend.token_to_id(t["content"]) != i]
    except BaseException as error:
        _raise_data_error(error, f"{LIBRARY_FILE}: the tokenizers library rejects it")
    if wrong:
        raise DataError(
            f"{LIBRARY_FILE}: the tokenizers library gives {wrong[0]['content']!r:.40} another id than "
            f"{wrong[0]['id']}, which the files say: added tokens must follow the vocabulary without gaps."
        )
    return backend


def _raise_data_error(error: BaseException, what: str) -> "Any":
    """Raise `DataError` for an error of the library; its panics are no subclass of `Exception`."""
    is_panic = type(error).__name__ == "PanicException"
    if not is_panic and (not isinstance(error, Exception) or isinstance(error, MemoryError)):
        raise error
    raise DataError(f"{what}: {str(error) or type(error).__name__!s:.300}.") from error


@contextmanager
def _file_errors(name: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise type(error)(f"{name}: {error}") from None
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"{name} is not as transformers writes it: {reason:.300}.") from None


def _is_lossless(model: LibraryModel) -> bool:
    return (
        model.kind == "byte_bpe"
        and _BYTES.keys() <= model.vocabulary.keys()
        and all(step["type"] == "ByteLevel" for step in model.normalizers)
        and not any(
            step["type"] in _REMOVES_TEXT or step.get("add_prefix_space") or step.get("behavior") == "Removed"
            for step in model.pre_tokenizers
        )
        and not any(token["lstrip"] or token["rstrip"] for token in model.added.values())
    )


def _notes(raw: Mapping[str, Any], model: LibraryModel, unknown: Sequence[str]) -> Iterator[str]:
    ignored = [name for name in ("truncation", "padding") if raw.get(name)]
    if ignored:
        yield (f"{LIBRARY_FILE} has {' and '.join(ignored)}, which batch.seq_len decides here: not applied.")
    if model.has_dropout:
        yield f"{LIBRARY_FILE} has dropout, with which a text has other ids each time: not applied."
    for role in unknown:
        yield f"the {role}_token of the files beside {LIBRARY_FILE} has no id there: it is left out."


def _canonical(raw: Mapping[str, Any]) -> Iterator[Any]:
    """What decides about ids and texts, in one form whichever version of the library wrote it.

    Shards and checkpoints store a digest of it: it must not change.
    """
    model = {key: value for key, value in raw["model"].items() if value not in (None, False, "")}
    vocabulary = sorted(model.pop("vocab").items(), key=itemgetter(1))
    yield [text for text, _ in vocabulary]
    yield [index for _, index in vocabulary]
    yield [m.replace(" ", "\0") if isinstance(m, str) else "\0".join(m) for m in model.pop("merges", [])]
    yield {**raw, "model": model}
