"""Reads and writes YAML with the scalar types of YAML 1.2; a duplicate key is an error."""

import os
import re
import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from distft.config.bounds import (
    CHARACTERS_PER_VALUE,
    MOST_FILE_BYTES,
    MOST_LEVELS,
    MOST_VALUES,
    too_deep,
    too_many,
)
from distft.config.redaction import redact
from distft.errors import ConfigError

# PyYAML follows YAML 1.1, where 1e-3 is a string, 010 is eight, 1:30 is ninety and `no` is false. Editors
# follow 1.2. Underscores in numbers (524_288) stay allowed, as in 1.1; .nan is excluded: it equals nothing.
_WHOLE = r"(?:0|[1-9][0-9_]*)"
_EXPONENT = r"[eE][-+]?[0-9]+"
_WHOLE_EXPONENT = r"[eE]\+?(?:1[0-8]|[0-9])"  # 1e5 is the integer 100000, which is read as a float as well
_RESOLVERS = (  # tag, pattern, possible first characters
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", rf"[-+]?{_WHOLE}(?:{_WHOLE_EXPONENT})?|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        rf"[-+]?(?:{_WHOLE}\.[0-9]*(?:{_EXPONENT})?|\.[0-9]+(?:{_EXPONENT})?|{_WHOLE}{_EXPONENT})|[-+]?\.inf",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("merge", r"<<", "<"),
)
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
_MOST_DIGITS = 100  # of an integer
_TYPE_NAMES = {list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, first_characters in _RESOLVERS:
        for first in first_characters:
            table.setdefault(first, []).append((f"tag:yaml.org,2002:{name}", re.compile(rf"(?:{pattern})\Z")))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()
    yaml_constructors = {  # noqa: RUF012 - PyYAML's class attribute
        f"{_TAG}{name}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{name}"] for name in _PLAIN_TAGS
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.num_levels = getattr(self, "num_levels", -1) + 1
        if self.num_levels > MOST_LEVELS:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, too_deep(), mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.num_levels -= 1

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        if len(text) > _MOST_DIGITS:
            raise _error(f"an integer of {len(text)} digits does not fit into 64 bits", node)
        try:
            mantissa, _, exponent = ("", "", "") if text.startswith("0x") else text.lower().partition("e")
            return int(mantissa) * 10 ** int(exponent) if exponent else int(text, 0)
        except ValueError:
            raise _error(f"{text!r} is not an integer", node) from None

    def construct_number(self, node: yaml.ScalarNode) -> float:
        try:
            return float(self.construct_yaml_float(node))
        except ValueError:
            raise _error(f"{node.value[:_MOST_DIGITS]!r} is not a number", node) from None

    def construct_other(self, node: yaml.Node) -> Any:
        tag = node.tag.replace(_TAG, "!!")[:_MOST_DIGITS]
        raise _error(f"the tag {tag} has no meaning here: leave it out", node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    line = seen[key].start_mark.line + 1
                    raise _error(
                        f"duplicate key {str(key)[:_MOST_DIGITS]!r}, first given on line {line}", key_node
                    )
                seen[key] = key_node
        return super().construct_mapping(node, deep)


_Loader.add_constructor(f"{_TAG}int", _Loader.construct_integer)
_Loader.add_constructor(f"{_TAG}float", _Loader.construct_number)
_Loader.add_constructor(None, _Loader.construct_other)


def _error(problem: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _require_small(root: yaml.Node) -> None:
    """Raise before anything is constructed: merges (`<<`) and aliases can make much of a short text."""
    num_values = 0
    stack = [(root, 0)]
    while stack:
        node, level = stack.pop()
        num_values += 1
        if level > MOST_LEVELS:
            raise _error(too_deep(), node)
        if isinstance(node, yaml.ScalarNode):
            num_values += len(node.value) // CHARACTERS_PER_VALUE
        elif isinstance(node, yaml.MappingNode):
            stack += ((child, level + 1) for pair in node.value for child in pair)
        else:
            stack += ((child, level + 1) for child in node.value)
        if num_values > MOST_VALUES:
            raise _error(too_many(), root)


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
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _require_small(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{source}{where}: {error.problem or 'not YAML'}{context}.") from None
    except yaml.reader.ReaderError as error:
        raise ConfigError(
            f"{source}: character {error.position} is not allowed in YAML: {error.reason}."
        ) from None
    except RecursionError:
        raise ConfigError(f"{source} {too_deep()}.") from None
    except ValueError as error:
        raise ConfigError(f"{source}: not YAML: {error}.") from None


def parse_yaml(text: str, *, source: str = "<text>") -> dict[str, Any]:
    """The mapping in the YAML document `text`; empty text is an empty mapping. Raises `ConfigError`."""
    value = yaml_value(text, source=source)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{source} contains {_TYPE_NAMES[type(value)]} in place of settings: write `name: value` lines."
        )
    return value


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in the YAML file `path` (UTF-8).

    Raises `ConfigError` for a path at which no regular file can be read, and for a file that is too long, is
    not YAML (with line and column), contains a key twice, or contains no mapping.
    """
    name = str(path)
    if "://" in name:
        raise ConfigError(
            f"{redact(name)}: a configuration is not read from a URL, since it may name code to run: "
            "download it, look at it, and give the path of the file."
        )
    try:
        text = _read(name).decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file. Give the path of a YAML file, absolute or relative to {Path.cwd()}."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8.") from None
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError(f"{path!s}: cannot be read: {reason}.") from None
    return parse_yaml(text, source=name)


def _read(path: str) -> bytes:
    """The content of a regular file of limited size. A named pipe without a writer does not block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "it is no regular file, such as a YAML file")
        data = file.read(MOST_FILE_BYTES + 1)
    if len(data) > MOST_FILE_BYTES:
        raise OSError(0, f"it is longer than {MOST_FILE_BYTES >> 20} MiB, so it is no configuration")
    return data


def to_yaml(value: Any) -> str:
    """YAML that `yaml_value` reads back as `value` (dicts, lists, strings, numbers, None)."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
