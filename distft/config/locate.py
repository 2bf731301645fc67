"""Translates the location of a pydantic error into the dotted key that the user wrote.

Pydantic's locations also contain names of union members and validators. Walking the type annotations along
with the location separates those from keys, and finds the valid names in place of an unknown one.
"""

import collections.abc
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typing_extensions import TypeAliasType

from distft.config.component import EXTERNAL_TAG, Component, import_settings, members_by_type

_UNIONS = (Union, types.UnionType)
_SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


@dataclass(kw_only=True, slots=True)
class Location:
    """Where an error is, in terms of the user's keys."""

    keys: list[str | int] = field(default_factory=list)  # from the top; an int is a list index
    known_names: list[str] = field(default_factory=list)  # valid in place of the last key, if it is a setting
    # The setting there of which the last key is a value, and its values: `causal` is one of `attention`
    valued: tuple[str, Sequence[Any]] | None = None
    union_keys: tuple[str | int, ...] | None = None  # of the innermost union without a `type` to decide
    tag: str | None = None  # the `type` of the settings that the last key is in, if a union selected them
    other_tags: list[str] = field(default_factory=list)  # the types that have the last key as a setting


def locate(
    annotation: Any, raw: Any, pydantic_location: Sequence[str | int], *, trust: bool = False
) -> Location:
    """The location of an error that pydantic found in `raw`, which was parsed as `annotation`.

    `trust`: whether a class outside distft that `raw` names may be imported, as it was by the parser.
    """
    location = Location()
    rest = list(pydantic_location)
    while rest:
        annotation = _unwrap(annotation)
        origin = get_origin(annotation)
        if isinstance(annotation, _TaggedUnion):
            union, tag = annotation, rest.pop(0)
            annotation = union.member(tag, raw, trust=trust)
            location.tag = str(tag)
            location.other_tags = union.tags_with(rest[0]) if len(rest) == 1 else []
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            key = rest.pop(0)
            fields = {info.alias or name: info for name, info in annotation.model_fields.items()}
            location.keys.append(key)
            location.known_names = list(fields)
            known = ((name, _literals(info.annotation)) for name, info in fields.items())
            location.valued = next(((name, values) for name, values in known if key in values), None)
            annotation = _field_annotation(fields[key]) if key in fields else Any
            raw = _value_at(raw, key)
        elif origin in _UNIONS:
            location.union_keys = tuple(location.keys)
            annotation = _member_with_label(annotation, str(rest.pop(0)))
        elif origin in _SEQUENCES or origin in _MAPPINGS:
            key = rest.pop(0)
            location.keys.append(key)
            annotation = _item_annotation(annotation, key)
            raw = _value_at(raw, key)
            if rest == ["[key]"]:
                rest.clear()
        else:
            key = rest.pop(0)
            if _value_at(raw, key) is not None or not rest:
                location.keys.append(key)
                raw = _value_at(raw, key)
    return location


@dataclass(frozen=True, slots=True)
class _TaggedUnion:
    """A union whose member is chosen by a key of the data; pydantic's locations contain that tag."""

    members: Mapping[str, type[BaseModel]]

    def tags_with(self, key: str | int) -> list[str]:
        """The types of the members that have a setting `key`."""
        return [tag for tag, member in self.members.items() if key in member.model_fields]

    def member(self, tag: str | int, raw: Any, *, trust: bool) -> Any:
        if tag != EXTERNAL_TAG:
            return self.members.get(str(tag), Any)
        if not trust:
            return Any
        try:
            return import_settings(raw["type"])
        except ValueError:
            return Any


def _unwrap(annotation: Any) -> Any:
    """`annotation` without aliases, `None` and metadata; a union with a discriminator as `_TaggedUnion`."""
    while True:
        if isinstance(annotation, TypeAliasType):
            annotation = annotation.__value__
        elif get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
            for item in metadata:
                if isinstance(item, Component):
                    return _TaggedUnion(members_by_type(annotation))
                if isinstance(item, FieldInfo) and isinstance(item.discriminator, str):
                    return _TaggedUnion(_members_by_field(annotation, item.discriminator))
        elif get_origin(annotation) in _UNIONS:
            members = [member for member in get_args(annotation) if member is not type(None)]
            if len(members) > 1:
                return annotation
            annotation = members[0]
        else:
            return annotation


def _literals(annotation: Any) -> Sequence[Any]:
    """The values of a `Literal`, or of a union with one; empty for others."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    members = get_args(annotation) if get_origin(annotation) in _UNIONS else ()
    return [value for member in members for value in _literals(member)]


def _field_annotation(info: FieldInfo) -> Any:
    """The whole annotation of a field: pydantic stores its outermost metadata separately."""
    annotation: Any = info.annotation
    for item in info.metadata:
        annotation = Annotated[annotation, item]
    return Annotated[annotation, info] if info.discriminator else annotation


def _members_by_field(union: Any, name: str) -> dict[str, type[BaseModel]]:
    """The members of a union by the values of their `Literal` field `name`."""
    members = [_unwrap(member) for member in get_args(union) if member is not type(None)]
    return {
        str(tag): member
        for member in members
        if isinstance(member, type) and issubclass(member, BaseModel) and name in member.model_fields
        for tag in get_args(member.model_fields[name].annotation)
    }


def _member_with_label(union: Any, label: str) -> Any:
    """The member that pydantic labels `label`: a class by its name, a container as `tuple[...]`."""
    for member in get_args(union):
        plain = _unwrap(member)
        name = getattr(get_origin(plain) or plain, "__name__", "")
        if name and (label == name or label.startswith(f"{name}[")):
            return member
    return Any


def _item_annotation(annotation: Any, key: str | int) -> Any:
    arguments = get_args(annotation)
    if get_origin(annotation) in _MAPPINGS:
        return arguments[1] if len(arguments) == 2 else Any
    if get_origin(annotation) is tuple and Ellipsis not in arguments:
        return arguments[key] if isinstance(key, int) and key < len(arguments) else Any
    return arguments[0] if arguments else Any


def _value_at(raw: Any, key: str | int) -> Any:
    try:
        return raw[key]
    except (LookupError, TypeError):
        return None
