"""Dotted keys: `data.sources.0.path`; a part with dots of its own is quoted: `lr_scales."layers.0"`."""

import difflib
import re
from collections.abc import Iterable, Sequence

_PART = re.compile(r'"(?P<quoted>[^"]*)"|(?P<plain>[^."]+)')
_SHOWN_NAMES = 12


def split_key(key: str) -> list[str]:
    """The parts of a dotted key. Raises `ValueError` where it is none: empty parts, a lone quote."""
    parts, position = [], 0
    while True:
        match = _PART.match(key, position)
        if match is None:
            raise ValueError(f"{key!r} is no dotted key such as train.max_steps")
        parts.append(match["plain"] if match["quoted"] is None else match["quoted"])
        position = match.end()
        if position == len(key):
            return parts
        if key[position] != ".":
            raise ValueError(f"{key!r} is no dotted key such as train.max_steps")
        position += 1


def join_key(parts: Iterable[str | int]) -> str:
    """The dotted key that `split_key` takes apart again."""
    texts = [str(part) for part in parts]
    return ".".join(text if text and not set(text) & set('."=') else f'"{text}"' for text in texts)


def nearest(name: str, known: Sequence[str]) -> str:
    """A sentence that offers the name in `known` nearest to `name`, or all of them where none is near."""
    if not known:
        return "Nothing can be set here."
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"Did you mean {near[0]!r}?"
    more = f" and {len(known) - _SHOWN_NAMES} more" if len(known) > _SHOWN_NAMES else ""
    return f"Known here: {', '.join(known[:_SHOWN_NAMES])}{more}."
