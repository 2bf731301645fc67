"""Plain data to settings, with every fault told at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, PydanticSerializationError, to_json

from distft.config.keys import join_key, nearest, split_key
from distft.config.locate import Place, locate
from distft.config.redaction import MASK, is_secret_name, redact
from distft.config.settings import Settings
from distft.errors import ConfigError

T = TypeVar("T")
_LONGEST_VALUE = 60  # characters of a value that an error shows


@overload
def parse(annotation: type[T], raw: Any, *, where: str = "") -> T: ...
@overload
def parse(annotation: Any, raw: Any, *, where: str = "") -> Any: ...
def parse(annotation: Any, raw: Any, *, where: str = "") -> Any:
    """`raw` (dicts, lists, scalars, as from YAML) as an object of type `annotation`.

    Types are strict as in JSON: "3" and 3.0 are no integers, 1 is no boolean; integers do for floats, lists
    for tuples, strings for paths and enums. `where` is the dotted key under which `raw` stands. Raises one
    `ConfigError` with a line for each fault.
    """
    prefix: list[str | int] = list(split_key(where)) if where else []
    data = raw.model_dump(mode="json") if isinstance(raw, Settings) else raw
    try:
        # JSON mode is what makes pydantic strict about scalars and yet take a list for a tuple.
        text = to_json(data, inf_nan_mode="constants", by_alias=True)
    except (PydanticSerializationError, ValueError) as error:
        raise ConfigError(f"{where or 'the configuration'} is not plain data: {error}.") from None
    try:
        return TypeAdapter(annotation).validate_json(text, strict=True)
    except ValidationError as error:
        # A default that hangs on a faulty size cannot be found; the size itself is told already.
        details = [d for d in error.errors(include_url=False) if d["type"] != "default_factory_not_called"]
    faults = [_fault(annotation, data, detail, prefix) for detail in details]
    raise ConfigError("\n".join(_lines(faults)))


@dataclass(frozen=True, slots=True)
class _Fault:
    place: Place
    subject: str  # key and value
    reason: str


def _lines(faults: list[_Fault]) -> list[str]:
    """One line a key. Of the members that a union tried, those that got deeper into the data tell more."""
    lines: dict[str, list[str]] = {}
    for fault in faults:
        got_deeper = any(
            other.place.undecided_at == fault.place.undecided_at
            and len(other.place.parts) > len(fault.place.parts)
            for other in faults
        )
        if fault.place.undecided_at == tuple(fault.place.parts) and got_deeper:
            continue
        reasons = lines.setdefault(fault.subject, [])
        if fault.reason not in reasons:
            reasons.append(fault.reason)
    return [
        _sentence(subject + ", or ".join([first, *(text[0].lower() + text[1:] for text in others)]))
        for subject, (first, *others) in lines.items()
    ]


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else f"{text}."


def _fault(annotation: Any, data: Any, detail: ErrorDetails, prefix: list[str | int]) -> _Fault:
    place = locate(annotation, data, detail["loc"])
    kind, value = detail["type"], detail["input"]
    parts = [*prefix, *place.parts]
    key = join_key(parts)
    shown = f"{key}{_shown(parts, value)}"
    if kind == "extra_forbidden":
        return _Fault(place, f"{shown} is not a setting. ", nearest(str(parts[-1]), place.known_names))
    if kind == "missing":
        return _Fault(place, f"{key} is missing", ": it has no default")
    if kind in {"union_tag_invalid", "union_tag_not_found", "part_type"}:
        return _Fault(place, f"{key}: " if key else "", _choice(detail))
    separator = ": " if shown else ""
    return _Fault(place, f"{shown}{separator}", _reason(kind, value, detail["msg"]))


def _shown(parts: list[str | int], value: Any) -> str:
    """`=value` for a scalar or a short list, masked where it is secret; nothing for a mapping."""
    if isinstance(value, Mapping | Settings) or not parts:
        return ""
    if is_secret_name(str(parts[-1]), value):
        return f"={MASK}"
    words = {None: "null", True: "true", False: "false"}
    plain = redact(value)
    text = words[plain] if plain is None or isinstance(plain, bool) else repr(plain)
    return f"={text}" if len(text) <= _LONGEST_VALUE else f"={text[: _LONGEST_VALUE - 3]}..."


def _choice(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "part_type":
        return str(context["reason"])
    if detail["type"] == "union_tag_not_found":
        return f"{str(context['discriminator']).strip(chr(39))} is missing; it says which settings these are."
    known = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
    name = str(context["discriminator"]).strip("'")
    tag = str(context["tag"])
    return f"{name} {tag!r} is not known. {nearest(tag, known)} Choose one: {', '.join(known)}."


def _reason(kind: str, value: Any, message: str) -> str:
    text = " ".join(message.removeprefix("Value error, ").removeprefix("Assertion failed, ").split())
    if kind in {"model_type", "dict_type", "model_attributes_type"}:
        text = "A mapping of settings is wanted here"
    elif kind == "int_type" and isinstance(value, float) and value.is_integer():
        text += f"; write {int(value)}"
    elif kind == "string_type" and isinstance(value, bool | int | float):
        text += "; put it in quotes"
    elif kind == "bool_type":
        text += "; write true or false"
    return text
