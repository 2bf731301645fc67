"""Dotted keys (`data.sources.0.path`), and overrides of a configuration by them (`train.max_steps=50`)."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from distft.config.redaction import redact
from distft.config.yaml_text import yaml_value
from distft.errors import ConfigError

_MOST_CHARACTERS = 60  # of a value in a message
_NAME = re.compile(r'"(?P<quoted>[^"]*)"|(?P<plain>[^."]+)')


def split_key(key: str) -> list[str]:
    """The names in a dotted key; a name that contains dots is quoted: `lr_scales."layers.0"`.

    Raises `ValueError` for an empty name or an unmatched quote.
    """
    names, position = [], 0
    while True:
        match = _NAME.match(key, position)
        if match is None:
            raise ValueError(f"{key!r} is not a dotted key such as train.max_steps")
        names.append(match["plain"] if match["quoted"] is None else match["quoted"])
        position = match.end()
        if position == len(key):
            return names
        if key[position] != ".":
            raise ValueError(f"{key!r} is not a dotted key such as train.max_steps")
        position += 1


def join_key(names: Iterable[str | int]) -> str:
    """The dotted key that `split_key` splits into `names`."""
    texts = [str(name) for name in names]
    return ".".join(text if text and not set(text) & set('."=') else f'"{text}"' for text in texts)


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with every `dotted.key=value` applied in order.

    Values are YAML (`null`, `[1, 2]`, `1e-3`; an empty value is null). Missing mappings are created; list
    elements are addressed by index. Raises one `ConfigError` that lists every impossible override.
    """
    changed = copy.deepcopy(dict(raw))
    problems = []
    for override in overrides:
        try:
            key, equals, text = split_override(override)
            if not equals:
                raise ValueError("write key=value, such as train.max_steps=50")
            _set_value(changed, split_key(key), yaml_value(text, source=f"the value of {key}"))
        except ValueError as error:
            problems.append(f"{redact(override)!r} is not an override: {error}.")
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return changed


def split_override(override: str) -> tuple[str, str, str]:
    """Key, "=" and value, split at the first "=" outside quotes; "=" is empty if there is none."""
    in_quotes = False
    for position, character in enumerate(override):
        if character == '"':
            in_quotes = not in_quotes
        elif character == "=" and not in_quotes:
            return override[:position].strip(), "=", override[position + 1 :]
    return override, "", ""


def _set_value(config: Any, names: Sequence[str], value: Any) -> None:
    node = config
    for depth, name in enumerate(names, start=1):
        index: str | int = name
        if isinstance(node, list):
            if not (name.isascii() and name.isdigit() and int(name) < len(node)):
                size = f" (0 to {len(node) - 1})" if node else ", which is empty"
                raise ConfigError(f"{join_key(names[:depth])}: {name!r} is not an index of this list{size}.")
            index = int(name)
        elif not isinstance(node, dict):
            shown = repr(next(iter(redact({names[depth - 2]: node}).values())))[:_MOST_CHARACTERS]
            raise ConfigError(
                f"{join_key(names)} cannot be set: {join_key(names[: depth - 1])}={shown} is not a mapping."
            )
        if depth == len(names):
            node[index] = value
        else:
            if isinstance(node, dict):
                node.setdefault(index, None)
            if node[index] is None:
                node[index] = {}
            node = node[index]
