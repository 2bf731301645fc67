"""Reads and writes YAML with the scalar types of YAML 1.2; a duplicate key is an error."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from distft.errors import ConfigError

# PyYAML follows YAML 1.1, where 1e-3 is a string, 010 is eight, 1:30 is ninety and `no` is false. Editors
# follow 1.2. Underscores in numbers (524_288) stay allowed, as in 1.1; .nan is excluded: it equals nothing.
_WHOLE = r"(?:0|[1-9][0-9_]*)"
_EXPONENT = r"[eE][-+]?[0-9]+"
_RESOLVERS = (  # tag, pattern, possible first characters
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", rf"[-+]?{_WHOLE}|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        rf"[-+]?(?:{_WHOLE}\.[0-9]*(?:{_EXPONENT})?|\.[0-9]+(?:{_EXPONENT})?|{_WHOLE}{_EXPONENT})|[-+]?\.inf",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("merge", r"<<", "<"),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, first_characters in _RESOLVERS:
        for first in first_characters:
            table.setdefault(first, []).append((f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z")))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None,
                        None,
                        f"duplicate key {key!r}, first given on line {seen[key].start_mark.line + 1}",
                        key_node.start_mark,
                    )
                seen[key] = key_node
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML writes the line break U+0085 unescaped and reads it as a space; double quotes escape it.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if "\x85" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def yaml_value(text: str, *, source: str) -> Any:
    """The value of the YAML document `text`. Raises `ConfigError` with `source`, line and column."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{source}{where}: {error.problem or 'not YAML'}{context}.") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"{source}: character {error.position} is not allowed in YAML: {error.reason}."
        ) from None
    except (ValueError, RecursionError) as error:  # numbers such as 0x_, nesting too deep
        raise ConfigError(f"{source}: not YAML: {error}.") from None


def parse_yaml(text: str, *, source: str = "<text>") -> dict[str, Any]:
    """The mapping in the YAML document `text`; empty text is an empty mapping. Raises `ConfigError`."""
    value = yaml_value(text, source=source)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{source} contains a {type(value).__name__} at the top level; write `name: value` lines instead."
        )
    return value


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file `path` (UTF-8).

    Raises `ConfigError` for a file that cannot be read, is not YAML (with line and column), contains a key
    twice, or contains no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. Give the path of a YAML file, absolute or relative to {Path.cwd()}."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    return parse_yaml(text, source=str(path))


def to_yaml(value: Any) -> str:
    """YAML that `yaml_value` reads back as `value` (dicts, lists, strings, numbers, None)."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
