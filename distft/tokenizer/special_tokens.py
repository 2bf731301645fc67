"""Which tokens of a tokenizer of transformers begin, end and pad a text."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from distft.tokenizer.companions import checked_text
from distft.tokenizer.library_json import add_token

ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
# What transformers' classes have where the files do not say.
_USUAL = {
    "bos": ("[CLS]", "<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("[SEP]", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}
_STANDS_FOR = {"bos": "cls", "eos": "sep"}  # BERT's begin and end of a text


@dataclass(kw_only=True, slots=True)
class SpecialTokens:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say."""

    texts: dict[str, str | None] = field(default_factory=dict)  # by role; None: the files say that none is
    added: dict[int, dict[str, Any]] = field(default_factory=dict)  # by id
    settings: dict[str, Any] = field(default_factory=dict)  # of tokenizer_config.json

    def read(self, raw: Mapping[str, Any]) -> None:
        """Add what a tokenizer_config.json or special_tokens_map.json says; what is known stays."""
        for role in ROLES:
            key = f"{role}_token"
            if key in raw and role not in self.texts:
                token = raw[key]
                text = token["content"] if isinstance(token, dict) else token
                self.texts[role] = None if text is None else checked_text(text)
        for index, token in (raw.get("added_tokens_decoder") or {}).items():
            add_token(self.added, int(index), token["content"], token)

    def read_added(self, raw: Mapping[str, Any]) -> None:
        """Add what an added_tokens.json says: ids by text."""
        for text, index in raw.items():
            if index not in self.added:
                add_token(self.added, index, text, {"special": False})

    def resolved(self, known: Container[str]) -> dict[str, str]:
        """The tokens by role, of those that are `known`; bos and eos are BERT's where there are no others."""
        found: dict[str, str] = {}
        for role in ROLES:
            text = self.texts.get(role)
            if text is None and role in _STANDS_FOR:
                text = self.texts.get(_STANDS_FOR[role])
            is_told = role in self.texts or _STANDS_FOR.get(role) in self.texts
            usual = () if is_told else _USUAL[role]
            text = text if is_told else next((t for t in usual if t in known), None)
            if text is not None and text in known:
                found[role] = text
        return found

    def unknown(self, known: Container[str]) -> list[str]:
        """The roles whose token has no id."""
        return [role for role, text in self.texts.items() if text is not None and text not in known]


def begins_with_special_token(post_processor: Any) -> bool:
    """Whether this part of a tokenizer.json puts a special token before a text."""
    if not isinstance(post_processor, dict):
        return False
    kind = post_processor.get("type")
    if kind == "Sequence":
        return any(map(begins_with_special_token, post_processor.get("processors") or ()))
    if kind == "TemplateProcessing":
        return "SpecialToken" in (post_processor.get("single") or [{}])[0]
    return kind in {"BertProcessing", "RobertaProcessing"}
