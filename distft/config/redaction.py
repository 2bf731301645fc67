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
_SECRET_WORD = re.compile(
    r"password|passwd|passphrase|passkey|passcode|pwd|secrets?|credentials?|apikey|signature|jwt|cookies?"
)
_SECRET_PAIRS = frozenset(  # words that make a key a secret one
    (word, "key")
    for word in ("api", "access", "secret", "private", "auth", "account", "storage", "shared", "signing")
)
_SECRET_TEXTS = frozenset({"auth", "authorization", "bearer", "sig", "sas"})  # secret only if a text
# With one of these words, `token` means a token of the vocabulary, not a secret.
_VOCABULARY_WORD = re.compile(
    r"bos|eos|pad|unk|cls|sep|mask|special|start|end|stop|begin|image|added|first|last"
)

_URL_LOGIN = re.compile(r"(?<=://)[^/\s?#]+@")  # up to the last @: a password may contain one
_ASSIGNMENT = re.compile(
    # From the beginning of a word, and of a bounded length: otherwise a long text takes quadratic time.
    r"(?<![\w.\-])(?P<key>[\w.\-]{1,200}+)(?P<sign>['\"]?\s*(?:=|:\s)\s*)(?P<value>'[^']+'|\"[^\"]+\"|[^&\s;,'\"]+)"
)
_URL_QUERY = re.compile(r"(?<=[?&])[\w.\-]+=[^&\s'\"]+")
_KNOWN_KEYS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[opsur]_[A-Za-z0-9]{16,}|github_pat_\w{16,}"
    r"|glpat-[\w\-]{16,}|xox[abprs]-[\w\-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w\-]{30,}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|ya29\.[\w\-]{16,}|nvapi-[\w\-]{16,}|dapi[0-9a-f]{32}"
    r"|npm_[A-Za-z0-9]{30,}|pypi-[\w\-]{30,}|eyJ[\w\-]{8,}\.[\w\-]{8,}\.[\w\-]*)"
    r"|(?<=Bearer )\S+|(?<=Basic )[A-Za-z0-9+/]{8,}={0,2}(?![\w+/])"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)


def is_secret_name(name: str, value: Any = "") -> bool:
    """Whether a setting with this name and value must be masked."""
    words = tuple(word.lower() for word in _WORD.findall(name))
    if any(map(_SECRET_WORD.fullmatch, words)) or _SECRET_PAIRS & set(pairwise(words)):
        return True
    is_text = isinstance(value, str) or (
        isinstance(value, list | tuple) and any(isinstance(item, str) for item in value)
    )
    if not is_text or not words:
        return False
    is_token = words[-1] == "token" and not any(map(_VOCABULARY_WORD.fullmatch, words))
    return is_token or words[-1] in _SECRET_TEXTS


def redact(value: Any) -> Any:
    """A copy of plain data (dicts, lists, scalars) with `***` in place of everything that looks secret."""
    if isinstance(value, Mapping):
        return {
            redact(key): _mask(item) if is_secret_name(str(key), item) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item) for item in value]
    return _redact_text(value) if isinstance(value, str) else value


def redact_message(text: str) -> str:
    """An error's message without logins in URLs and keys of known forms.

    Unlike `redact`, it keeps `name: value`: in a sentence a token is one of the vocabulary.
    """
    return _KNOWN_KEYS.sub(MASK, _URL_QUERY.sub(_masked_query, _URL_LOGIN.sub(f"{MASK}@", text)))


def _masked_query(query: re.Match[str]) -> str:
    return _redact_text(query[0])


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
