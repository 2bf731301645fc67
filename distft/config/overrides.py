"""Changes to a configuration that are given on the command line: `train.max_steps=50`."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from distft.config.keys import join_key, split_key
from distft.config.yaml_text import yaml_value
from distft.errors import ConfigError


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with every `dotted.key=value` set; the last one wins.

    Values are YAML (`null`, `[1, 2]`, `1e-3`; nothing after `=` is null). Missing mappings are made; elements
    of lists go by index. Raises one `ConfigError` that lists every override that cannot be applied.
    """
    changed = copy.deepcopy(dict(raw))
    faults = []
    for override in overrides:
        try:
            key, equals, text = _cut(override)
            if not equals:
                raise ConfigError(f"{override!r} is no override: write key=value, as in train.max_steps=50.")
            _put(changed, split_key(key), yaml_value(text, source=f"the value of {key}"))
        except ValueError as error:
            faults.append(f"{override!r} is no override: {error}.")
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("\n".join(faults))
    return changed


def _cut(override: str) -> tuple[str, str, str]:
    """Key, "=" and value, cut at the first "=" that stands outside of quotes."""
    quoted = False
    for position, character in enumerate(override):
        if character == '"':
            quoted = not quoted
        elif character == "=" and not quoted:
            return override[:position].strip(), "=", override[position + 1 :]
    return override, "", ""


def _put(node: Any, parts: Sequence[str], value: Any) -> None:
    """Set the value below `node`, which is the whole configuration."""
    for depth, part in enumerate(parts, start=1):
        place: str | int = part
        if isinstance(node, list):
            if not (part.isascii() and part.isdigit() and int(part) < len(node)):
                size = f"0 to {len(node) - 1}" if node else "none, the list is empty"
                raise ConfigError(f"{join_key(parts[:depth])}: {part!r} is no index of this list ({size}).")
            place = int(part)
        elif not isinstance(node, dict):
            raise ConfigError(
                f"{join_key(parts)} cannot be set: {join_key(parts[: depth - 1])}={node!r} has no parts."
            )
        if depth == len(parts):
            node[place] = value
        else:
            if isinstance(node, dict):
                node.setdefault(place, None)
            if node[place] is None:
                node[place] = {}
            node = node[place]
