"""Plain data to settings and back; one error lists every wrong setting."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError, to_json

from distft.config.bounds import require_bounded
from distft.config.component import Settings, trusting
from distft.config.locate import Location, locate
from distft.config.overrides import join_key, split_key
from distft.config.reasons import reason_of
from distft.config.redaction import MASK, is_secret_name, redact
from distft.config.yaml_text import to_yaml
from distft.errors import ConfigError, did_you_mean, suggest_name

T = TypeVar("T")
_MOST_CHARACTERS = 60  # of a value in a message
_MOST_PROBLEMS = 50  # in a message


@overload
def parse(annotation: type[T], raw: Any, *, where: str = "", trust: bool = False) -> T: ...
@overload
def parse(annotation: Any, raw: Any, *, where: str = "", trust: bool = False) -> Any: ...
def parse(annotation: Any, raw: Any, *, where: str = "", trust: bool = False) -> Any:
    """Convert `raw` (dicts, lists, scalars, as from YAML) to an object of type `annotation`.

    Types are strict, as in JSON: an integer is not accepted as "3" or 3.0, nor a boolean as 1. An integer is
    accepted as a float, a list as a tuple, a string as a path or an enum. `where` is the dotted key of `raw`,
    for messages. `trust` imports the classes that `type: my_package.module:Class` names, which runs code:
    pass it for what the user gave to the command, never for what a checkpoint or another's file contains.
    Raises one `ConfigError` with a line for each problem.
    """
    trust = trust or isinstance(raw, Settings)  # whose classes are already imported
    prefix = _names(where)
    data = raw.model_dump(mode="json") if isinstance(raw, Settings) else raw
    require_bounded(data, where)
    try:
        # In JSON mode, pydantic is strict about scalars, yet accepts a list for a tuple.
        text = to_json(data, inf_nan_mode="constants", by_alias=True)
    except (PydanticSerializationError, ValueError) as error:
        raise ConfigError(f"{where or 'the configuration'} is not plain data: {error}.") from None
    try:
        return TypeAdapter(annotation).validate_json(text, strict=True, context=trusting(trust))
    except ValidationError as error:
        # A default computed from an invalid field is not called; the error of that field is in the list.
        details = [d for d in error.errors(include_url=False) if d["type"] != "default_factory_not_called"]
    problems = [
        _describe(annotation, data, detail, prefix, trust=trust) for detail in details[:_MOST_PROBLEMS]
    ]
    lines = _lines(problems)
    if len(details) > _MOST_PROBLEMS:
        lines.append(f"There are {len(details) - _MOST_PROBLEMS:,} more problems.")
    raise ConfigError("\n".join(lines))


def _names(where: str) -> list[str | int]:
    """The names in a dotted key; a text that is none, such as a path with two dots, is one name."""
    try:
        return [*split_key(where)] if where else []
    except ValueError:
        return [where]


def dump_yaml(settings: Settings, *, redacted: bool = False) -> str:
    """YAML from which `parse(type(settings), parse_yaml(text))` makes an equal object.

    `redacted`: with `***` in place of secrets, for what others may read.
    """
    plain = settings.model_dump(mode="json", by_alias=True)
    return to_yaml(redact(plain) if redacted else plain)


@dataclass(frozen=True, slots=True)
class _Problem:
    location: Location
    subject: str  # key and value
    reason: str


def _lines(problems: list[_Problem]) -> list[str]:
    """One line per key. For a union, only the members that match the data most deeply."""
    reasons_by_subject: dict[str, list[str]] = {}
    for problem in problems:
        union_keys = problem.location.union_keys
        another_is_deeper = any(
            other.location.union_keys == union_keys and len(other.location.keys) > len(problem.location.keys)
            for other in problems
        )
        if union_keys == tuple(problem.location.keys) and another_is_deeper:
            continue
        reasons = reasons_by_subject.setdefault(problem.subject, [])
        if problem.reason not in reasons:
            reasons.append(problem.reason)
    return [
        _sentence(subject + ", or ".join([first, *(text[0].lower() + text[1:] for text in others)]))
        for subject, (first, *others) in reasons_by_subject.items()
    ]


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def _describe(
    annotation: Any, data: Any, detail: ErrorDetails, prefix: list[str | int], *, trust: bool
) -> _Problem:
    location = locate(annotation, data, detail["loc"], trust=trust)
    kind, value = detail["type"], detail["input"]
    keys = [*prefix, *location.keys]
    key = join_key(keys)
    key_and_value = f"{key}{_equals_value(keys, value)}"
    if kind == "extra_forbidden":
        return _unknown_setting(location, keys, key_and_value)
    if kind == "missing":
        is_item = isinstance(keys[-1], int)
        return _Problem(
            location, f"{key} is missing", ": the list is too short" if is_item else ": it has no default"
        )
    if kind in {"union_tag_invalid", "union_tag_not_found", "component_type"}:
        return _Problem(location, f"{key}: " if key else "", _tag_reason(detail))
    if not key_and_value and kind not in {"value_error", "assertion_error"}:
        return _Problem(location, "The configuration ", reason_of(detail))
    return _Problem(location, f"{key_and_value}: " if key_and_value else "", reason_of(detail))


def _unknown_setting(location: Location, keys: list[str | int], key_and_value: str) -> _Problem:
    section = join_key(keys[:-1])
    if location.other_tags:
        types = " or ".join(location.other_tags)
        remedy = (
            f"type {types}, and {section}.type is {location.tag}. Leave it out; to drop all settings of "
            f"another type, set the section as a whole: {section}={{type: {location.tag}}}"
        )
        return _Problem(location, f"{key_and_value} is a setting of ", remedy)
    if location.valued is not None:
        name, values = location.valued
        setting, known = join_key([*keys[:-1], name]), ", ".join(map(str, values))
        remedy = f"{keys[-1]} is a value of {name}: set {setting} to one of {known}"
    else:
        remedy = suggest_name(str(keys[-1]), location.known_names).strip()
    return _Problem(location, f"{key_and_value} is not a setting. ", remedy)


def _equals_value(keys: list[str | int], value: Any) -> str:
    """`=value` for a scalar or a short list, masked if the key is a secret; empty for a mapping."""
    if isinstance(value, Mapping | Settings) or not keys:
        return ""
    if is_secret_name(str(keys[-1]), value):
        return f"={MASK}"
    yaml_words = {None: "null", True: "true", False: "false"}
    plain = redact(value)
    text = yaml_words[plain] if plain is None or isinstance(plain, bool) else repr(plain)
    return f"={text}" if len(text) <= _MOST_CHARACTERS else f"={text[: _MOST_CHARACTERS - 3]}..."


def _tag_reason(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "component_type":
        return str(context["reason"])
    name = str(context["discriminator"]).strip("'")
    if detail["type"] == "union_tag_not_found":
        return f"{name} is missing: it selects which settings are valid here."
    known = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
    tag = str(context["tag"])
    return f"{name} {tag!r} is unknown.{did_you_mean(tag, known)} Choose one: {', '.join(known)}."
