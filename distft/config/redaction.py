"""Masks passwords, keys and tokens in a configuration before it is stored or sent to a tracker.

A setting's name decides first (`password`, `hf_token`, but not `pad_token` or `num_tokens`), then the form of
its value (credentials in a URL, keys of well-known services). Masking may miss a secret: keep secrets in the
environment.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

MASK = "***"

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_SECRET_WORD = re.compile(r"password|passwd|passphrase|passkey|pwd|secrets?|credentials?|apikey|signature")
_SECRET_PAIRS = frozenset(
    {("api", "key"), ("access", "key"), ("secret", "key"), ("private", "key"), ("auth", "key")}
)
_SECRET_TEXTS = frozenset({"auth", "authorization", "bearer"})  # secret only if the value is text
# With one of these words, `token` means a token of the vocabulary, not a secret.
_VOCABULARY_WORD = re.compile(
    r"bos|eos|pad|unk|cls|sep|mask|special|start|end|stop|begin|image|added|first|last"
)

_URL_LOGIN = re.compile(r"(?<=://)[^/@\s?#]+@")
_ASSIGNMENT = re.compile(r"(?P<key>[\w.\-]+)(?P<sign>=|:\s+)(?P<value>[^&\s;,'\"]+)")
_KNOWN_KEYS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-[\w\-]{16,}|xox[abprs]-[\w\-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w\-]{30,}"
    r"|eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*)"
    r"|(?<=Bearer )\S+|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)


def is_secret_name(name: str, value: Any = "") -> bool:
    """Whether a setting with this name and value must be masked."""
    words = tuple(word.lower() for word in _WORD.findall(name))
    if any(map(_SECRET_WORD.fullmatch, words)) or _SECRET_PAIRS & set(pairwise(words)):
        return True
    if not isinstance(value, str) or not words:
        return False
    is_token = words[-1] == "token" and not any(map(_VOCABULARY_WORD.fullmatch, words))
    return is_token or words[-1] in _SECRET_TEXTS


def redact(value: Any) -> Any:
    """A copy of plain data (dicts, lists, scalars) with `***` in place of everything that looks secret."""
    if isinstance(value, Mapping):
        return {
            key: _mask(item) if is_secret_name(str(key), item) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item) for item in value]
    return _redact_text(value) if isinstance(value, str) else value


def _mask(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _mask(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_mask(item) for item in value]
    return value if value is None or isinstance(value, bool) or value == "" else MASK


def _redact_text(text: str) -> str:
    text = _KNOWN_KEYS.sub(MASK, _URL_LOGIN.sub(f"{MASK}@", text))
    return _ASSIGNMENT.sub(
        lambda m: f"{m['key']}{m['sign']}{MASK}" if is_secret_name(m["key"].split(".")[-1]) else m[0], text
    )
