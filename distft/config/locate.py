"""From the place that pydantic gives for a fault to the dotted key that the user wrote.

Pydantic's places also hold the names of union members and of validators. Walking the annotations beside them
tells which is which, and which names would have been valid at the place of an unknown one.
"""

import collections.abc
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typing_extensions import TypeAliasType

from distft.config.part import OUTSIDE_TAG, Part, import_settings, members_by_type

_UNIONS = (Union, types.UnionType)
_SEQUENCES = (list, tuple, set, frozenset, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


@dataclass(kw_only=True, slots=True)
class Place:
    """Where a fault is, as the user sees it."""

    parts: list[str | int] = field(default_factory=list)
    known_names: list[str] = field(
        default_factory=list
    )  # valid beside the last part, where that is a setting
    undecided_at: tuple[str | int, ...] | None = None  # the innermost union that no `type` decides


def locate(annotation: Any, raw: Any, location: Sequence[str | int]) -> Place:
    """Follow pydantic's `location` through `annotation`, with the data `raw` at hand."""
    place = Place()
    rest = list(location)
    while rest:
        annotation = _plain(annotation)
        origin = get_origin(annotation)
        if isinstance(annotation, _Chosen):
            annotation = annotation.member_of(rest.pop(0), raw)
        elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
            head = rest.pop(0)
            fields = {info.alias or name: info for name, info in annotation.model_fields.items()}
            place.parts.append(head)
            place.known_names = list(fields)
            annotation = _annotation_of(fields[head]) if head in fields else Any
            raw = _inside(raw, head)
        elif origin in _UNIONS:
            place.undecided_at = tuple(place.parts)
            annotation = _labelled(annotation, str(rest.pop(0)))
        elif origin in _SEQUENCES or origin in _MAPPINGS:
            head = rest.pop(0)
            place.parts.append(head)
            annotation = _item_of(annotation, head)
            raw = _inside(raw, head)
            if rest == ["[key]"]:
                rest.clear()
        else:
            head = rest.pop(0)
            if _inside(raw, head) is not None or not rest:
                place.parts.append(head)
                raw = _inside(raw, head)
    return place


@dataclass(frozen=True, slots=True)
class _Chosen:
    """A union whose member is chosen by a key of the data; pydantic's places name the choice."""

    members: Mapping[str, type[BaseModel]]

    def member_of(self, tag: str | int, raw: Any) -> Any:
        if tag != OUTSIDE_TAG:
            return self.members.get(str(tag), Any)
        try:
            return import_settings(raw["type"])
        except ValueError:
            return Any


def _plain(annotation: Any) -> Any:
    """`annotation` without aliases, `None` and metadata; a `_Chosen` for a union with a discriminator."""
    while True:
        if isinstance(annotation, TypeAliasType):
            annotation = annotation.__value__
        elif get_origin(annotation) is Annotated:
            annotation, *metadata = get_args(annotation)
            for mark in metadata:
                if isinstance(mark, Part):
                    return _Chosen(members_by_type(annotation))
                if isinstance(mark, FieldInfo) and isinstance(mark.discriminator, str):
                    return _Chosen(_by_field(annotation, mark.discriminator))
        elif get_origin(annotation) in _UNIONS:
            members = [member for member in get_args(annotation) if member is not type(None)]
            if len(members) > 1:
                return annotation
            annotation = members[0]
        else:
            return annotation


def _annotation_of(info: FieldInfo) -> Any:
    """The whole annotation of a field: pydantic keeps its outermost metadata apart."""
    annotation: Any = info.annotation
    for mark in info.metadata:
        annotation = Annotated[annotation, mark]
    return Annotated[annotation, info] if info.discriminator else annotation


def _by_field(union: Any, name: str) -> dict[str, type[BaseModel]]:
    members = [_plain(member) for member in get_args(union) if member is not type(None)]
    return {
        str(tag): member
        for member in members
        if isinstance(member, type) and issubclass(member, BaseModel) and name in member.model_fields
        for tag in get_args(member.model_fields[name].annotation)
    }


def _labelled(union: Any, label: str) -> Any:
    """The member of a union that pydantic calls `label`: classes by name, containers by how they begin."""
    for member in get_args(union):
        plain = _plain(member)
        name = getattr(get_origin(plain) or plain, "__name__", "")
        if name and (label == name or label.startswith(f"{name}[")):
            return member
    return Any


def _item_of(annotation: Any, head: str | int) -> Any:
    arguments = get_args(annotation)
    if get_origin(annotation) in _MAPPINGS:
        return arguments[1] if len(arguments) == 2 else Any
    if get_origin(annotation) is tuple and Ellipsis not in arguments:
        return arguments[head] if isinstance(head, int) and head < len(arguments) else Any
    return arguments[0] if arguments else Any


def _inside(raw: Any, head: str | int) -> Any:
    try:
        return raw[head]
    except (LookupError, TypeError):
        return None
