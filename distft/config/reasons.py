"""What is wrong with a setting, in words of settings: translates pydantic's errors, which speak of Python."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import ErrorDetails

from distft.errors import did_you_mean

_LIST = "must be a list, such as [a, b]"
_MAPPING = "must be a mapping of settings"
# By type of pydantic's error; `{name}` is a value of its context. A type that is not here must read well
# after `_plain`: tests/config/test_reasons.py goes through all of them.
_REASONS: Mapping[str, str] = {
    "json_invalid": "is not plain data ({error})",
    "recursion_loop": "contains itself",
    "recursion_depth_exceeded": "has too many levels",
    "invalid_key": "must have texts as keys",
    "missing": "is missing: it has no default",
    "none_required": "must be null",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "finite_number": "must be a finite number",
    "too_short": "must have {min_length} items or more, not {actual_length}",
    "too_long": "must have {max_length} items or less, not {actual_length}",
    "string_type": "must be a text",
    "string_unicode": "must be a text in Unicode",
    "string_too_short": "must have {min_length} characters or more",
    "string_too_long": "must have {max_length} characters or less",
    "string_pattern_mismatch": "must match the pattern {pattern}",
    "string_not_ascii": "must contain only ASCII characters",
    "enum": "must be {expected}",
    "literal_error": "must be {expected}",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be an integer",
    "int_parsing": "must be an integer",
    "int_parsing_size": "must be an integer of 64 bits",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "date_from_datetime_inexact": "must be a date without a time",
    "set_item_not_hashable": "must contain only texts and numbers",
    **dict.fromkeys(
        ("iterable_type", "list_type", "tuple_type", "set_type", "frozen_set_type", "deque_type"), _LIST
    ),
    **dict.fromkeys(
        (
            "model_type",
            "model_attributes_type",
            "dict_type",
            "frozen_dict_type",
            "ordered_dict_type",
            "counter_type",
            "mapping_type",
            "dataclass_type",
            "named_tuple_type",
        ),
        _MAPPING,
    ),
}
_SCALARS = {
    "int_type": re.compile(r"[-+]?[0-9][0-9_]*"),
    "float_type": re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?"),
    "bool_type": re.compile(r"true|false", re.IGNORECASE),
}
_ONE = re.compile(r"\b1 (item|character)s\b")
_QUOTED = re.compile(r"'([^']*)'")
_MOST_IN_REMEDY = 40  # characters of a value
_PHRASES = (  # of pydantic, in the messages of other types
    (re.compile(r"^(?:\w+ )?\w+ should\b"), "must"),
    (re.compile(r"\b(?:a|an) (?:valid )?(?:array|tuple|set)\b"), "a list"),
    (re.compile(r"\b(?:a|an) (?:valid )?(?:object|dictionary)\b"), "a mapping"),
    (re.compile(r"\bInput\b"), "it"),
)


def reason_of(detail: ErrorDetails) -> str:
    """What is wrong with the value of an error, with the remedy where the value shows it."""
    kind, value = detail["type"], detail["input"]
    if kind in {"value_error", "assertion_error"}:
        text = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        return " ".join(text.split())
    if kind not in _REASONS:
        return _plain(detail["msg"])
    context = {name: _shown(item) for name, item in detail.get("ctx", {}).items()}
    reason = _ONE.sub(r"1 \1", _REASONS[kind].format_map(context))
    if value is None and kind.endswith("_type"):
        return f"{reason}; a setting without a value is null"
    return f"{reason}{_remedy(kind, value, context)}"


def _shown(item: Any) -> str:
    """A bound as it stands in YAML: 1.0 is 1."""
    return "more" if item is None else f"{item:g}" if isinstance(item, float) else str(item)


def _remedy(kind: str, value: Any, context: Mapping[str, str]) -> str:
    """What to write instead, if the value shows what was meant."""
    if kind in {"int_type", "int_from_float"} and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind in _SCALARS and isinstance(value, str) and _SCALARS[kind].fullmatch(value):
        return "; leave out the quotes"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if (
        _REASONS[kind] == _LIST
        and isinstance(value, str | int | float)
        and len(str(value)) <= _MOST_IN_REMEDY
    ):
        return f"; write [{value}]"
    if kind in {"literal_error", "enum"} and isinstance(value, str):
        similar = did_you_mean(value, _QUOTED.findall(context["expected"]))
        return f".{similar}" if similar else ""
    return ""


def _plain(message: str) -> str:
    """A message of pydantic without its words for Python and JSON."""
    text = " ".join(message.split())
    for pattern, replacement in _PHRASES:
        text = pattern.sub(replacement, text)
    return text[:1].lower() + text[1:]
