"""Reads the files of a tokenizer of the tokenizers library: tokenizer.json, or the older ones of its kind.

BERT's vocab.txt and GPT-2's vocab.json with merges.txt become the tokenizer.json that transformers makes of
them.
"""

import json
from collections.abc import Mapping
from typing import Any

from distft import storage
from distft.errors import DataError
from distft.storage import AnyPath
from distft.tokenizer.files import (
    COMPANION_FILES,
    CONFIG_FILE,
    LIBRARY_FILE,
    MERGES,
    VOCAB_JSON,
    VOCAB_TXT,
    json_object,
    read_bounded,
)

_OF_VOCAB_TXT = ("Bert", "DistilBert", "Electra", "MobileBert", "Funnel", "MPNet", "LayoutLM")
_OF_MERGES = ("GPT2", "Roberta", "Bart", "Longformer", "DistilRoberta")
_ROBERTA = ("<s>", "</s>", "<mask>")
_UNK = "[UNK]"


def read_library_files(path: AnyPath, data: bytes) -> dict[str, bytes]:
    """The contents of tokenizer.json and its companions, by name; `data` is the content of `path`.

    Raises `DataError` if they cannot be read, or `path` is none of its kind.
    """
    directory = storage.parent(path)
    name = str(path).rstrip("/").rpartition("/")[2]
    companions = {}
    for companion in COMPANION_FILES:
        found = read_bounded(storage.join(directory, companion))
        if found is not None:
            companions[companion] = found
    if name in {VOCAB_TXT, VOCAB_JSON, MERGES}:
        owner = _class_name(directory, companions)
        known = _OF_VOCAB_TXT if name == VOCAB_TXT else _OF_MERGES
        if owner and owner.removesuffix("Fast").removesuffix("Tokenizer") not in known:
            raise DataError(
                f"tokenizer {path}: {CONFIG_FILE} beside it says {owner:.60}, whose {LIBRARY_FILE} is needed."
            )
        raw = _of_vocab_txt(data) if name == VOCAB_TXT else _of_merges(directory)
        data = json.dumps(raw, ensure_ascii=False).encode()
    return {LIBRARY_FILE: data, **companions}


def _class_name(directory: AnyPath, companions: Mapping[str, bytes]) -> str:
    if CONFIG_FILE not in companions:
        return ""
    raw = json_object(storage.join(directory, CONFIG_FILE), companions[CONFIG_FILE])
    return str(raw.get("tokenizer_class") or "")


def _of_vocab_txt(data: bytes) -> dict[str, Any]:
    """As transformers' `BertTokenizer`; tokenizer_config.json may change the normalizer."""
    lines = _decoded(data, VOCAB_TXT).removesuffix("\n").split("\n")  # as Python reads lines: at \n only
    vocabulary = {line: index for index, line in enumerate(lines) if line}
    raw = _tokenizer_json(
        {
            "type": "WordPiece",
            "unk_token": _UNK,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocabulary,
        }
    )
    raw["normalizer"] = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": True,
        "strip_accents": None,
        "lowercase": True,
    }
    raw["pre_tokenizer"] = {"type": "BertPreTokenizer"}
    raw["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    if {"[CLS]", "[SEP]"} <= vocabulary.keys():
        ends = {name: [text, vocabulary[text]] for name, text in (("sep", "[SEP]"), ("cls", "[CLS]"))}
        raw["post_processor"] = {"type": "BertProcessing", **ends}
    return raw


def _of_merges(directory: AnyPath) -> dict[str, Any]:
    """As transformers' `GPT2Tokenizer`, or `RobertaTokenizer` if the vocabulary has its special tokens."""
    paths = [storage.join(directory, name) for name in (VOCAB_JSON, MERGES)]
    contents = [read_bounded(path) for path in paths]
    for path, content in zip(paths, contents, strict=True):
        if content is None:
            raise DataError(f"tokenizer {path} is missing: {VOCAB_JSON} and {MERGES} belong together.")
    vocabulary = json_object(paths[0], contents[0] or b"")
    lines = _decoded(contents[1] or b"", MERGES).split("\n")
    merges = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
    raw = _tokenizer_json(
        {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": merges,
        }
    )
    options = {"add_prefix_space": False, "trim_offsets": True}
    for part in ("pre_tokenizer", "decoder", "post_processor"):
        raw[part] = {"type": "ByteLevel", **options, "use_regex": True}
    if all(isinstance(vocabulary.get(text), int) for text in _ROBERTA):
        ends = {"sep": ["</s>", vocabulary["</s>"]], "cls": ["<s>", vocabulary["<s>"]]}
        raw["post_processor"] = {"type": "RobertaProcessing", **ends, **options}
        mask = {"id": vocabulary["<mask>"], "content": "<mask>", "single_word": False, "lstrip": True}
        raw["added_tokens"] = [{**mask, "rstrip": False, "normalized": False, "special": True}]
    return raw


def _tokenizer_json(model: dict[str, Any]) -> dict[str, Any]:
    parts = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", **dict.fromkeys(parts), "added_tokens": [], "model": model}


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"tokenizer: {name} is not UTF-8: {error}.") from None
