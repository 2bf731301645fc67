"""Settings picked by `type`: one of a union of ours, or `my_package.module:Class` from outside."""

import importlib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import (
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
)
from pydantic_core import PydanticCustomError, core_schema, to_json

from distft.config.keys import nearest
from distft.config.settings import Settings

OUTSIDE_TAG = "my_package.module:Class"  # no member can be called so
_OUTSIDE_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Part:
    """Marks a union of settings classes that `type` chooses from, and that outside classes may join.

    `ScheduleConfig = Annotated[CosineConfig | ConstantConfig, Part()]`: each member has a field
    `type: Literal["..."]`. In YAML `type: cosine` picks a member; `type: my_package.module:Class` imports a
    subclass of `Settings` and gives it the keys beside `type`. What it must offer beyond that (a `build`
    method, say) is told by the members.
    """

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        members = members_by_type(source)
        choices: dict[Any, core_schema.CoreSchema] = {
            tag: core_schema.with_info_wrap_validator_function(
                _validate_as_json(member), handler.generate_schema(member)
            )
            for tag, member in members.items()
        }
        choices[OUTSIDE_TAG] = core_schema.with_info_plain_validator_function(_validate_outside)
        classes = {member: tag for tag, member in members.items()}

        def tag_of(value: Any) -> str | None:
            if isinstance(value, Settings):
                return classes.get(type(value), OUTSIDE_TAG)
            name = value.get("type") if isinstance(value, Mapping) else None
            if isinstance(name, str):
                return name if name in members or ":" not in name else OUTSIDE_TAG
            return None

        def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
            if tag_of(value) in choices:
                return validate(value)
            raise PydanticCustomError("part_type", "{reason}", {"reason": _why_not(value, list(members))})

        def dump(value: Any, serialize: SerializerFunctionWrapHandler) -> Any:
            if type(value) in classes:
                return serialize(value)
            fields = value.model_dump(mode="json")
            fields.pop("type", None)
            return {"type": f"{type(value).__module__}:{type(value).__qualname__}", **fields}

        return core_schema.no_info_wrap_validator_function(
            check,
            core_schema.tagged_union_schema(choices, tag_of),
            serialization=core_schema.wrap_serializer_function_ser_schema(dump),
        )

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        choices = schema["schema"]["choices"]
        members = [{**handler(choices[tag]), "required": ["type"]} for tag in choices if tag != OUTSIDE_TAG]
        outside = {
            "type": "object",
            "description": "Settings from outside: type is my_package.module:Class, the rest goes to it.",
            "properties": {"type": {"type": "string", "pattern": f"^{_OUTSIDE_NAME.pattern}$"}},
            "required": ["type"],
        }
        return {"oneOf": [*members, outside]}


def members_by_type(union: Any) -> dict[str, type[Settings]]:
    """The settings classes of a union, or a single one, by their `type`."""
    members = get_args(union) if get_origin(union) is not None or get_args(union) else (union,)
    found: dict[str, type[Settings]] = {}
    for member in members:
        field = (
            member.model_fields.get("type")
            if isinstance(member, type) and issubclass(member, Settings)
            else None
        )
        if field is None or get_origin(field.annotation) is not Literal:
            raise TypeError(f'{member!r} in a Part() needs a field such as type: Literal["name"] = "name"')
        for tag in get_args(field.annotation):
            if tag in found or ":" in tag:
                raise TypeError(f"type {tag!r} of {member.__name__} is taken already, or has a colon")
            found[tag] = member
    return found


def import_settings(name: str) -> type[Settings]:
    """The class that `my_package.module:Class` names. Raises `ValueError` that says why it cannot be had."""
    if not _OUTSIDE_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not of the form my_package.module:Class")
    module_name, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            "install it, or put its folder on PYTHONPATH"
        ) from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise ValueError(f"module {module_name!r} has no {path!r}. {nearest(attribute, _public(found))}")
        found = getattr(found, attribute)
    if not (isinstance(found, type) and issubclass(found, Settings)):
        raise ValueError(f"{name} is {found!r}, not a subclass of distft.config.Settings")
    return found


def _as_json(value: Any) -> bytes:
    return to_json(value, inf_nan_mode="constants")


def _public(owner: Any) -> list[str]:
    return [name for name in vars(owner) if not name.startswith("_")]


def _why_not(value: Any, known: list[str]) -> str:
    choices = f"{', '.join(known)}, or {OUTSIDE_TAG}"
    if not isinstance(value, Mapping):
        return f"a mapping with a type is wanted here (type: {choices})"
    if "type" not in value:
        return f"type is missing. Choose one: {choices}"
    return f"type {value['type']!r} is not known. {nearest(str(value['type']), known)} Choose one: {choices}"


def _validate_as_json(member: type[Settings]) -> Any:
    def validate(value: Any, plainly: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        if info.mode == "json" and not isinstance(value, Settings):
            # A wrapped validator hands on Python data, of which strict mode takes no list for a tuple.
            return member.model_validate_json(_as_json(value), strict=True)
        return plainly(value)

    return validate


def _validate_outside(value: Any, info: ValidationInfo) -> Settings:
    if isinstance(value, Settings):
        return value
    try:
        found = import_settings(value["type"])
    except ValueError as error:
        raise PydanticCustomError("part_type", "{reason}", {"reason": f"type {error}"}) from error
    rest = {key: item for key, item in value.items() if key != "type"}
    if info.mode == "json":
        return found.model_validate_json(_as_json(rest), strict=True)
    return found.model_validate(rest)
