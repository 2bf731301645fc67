"""`Settings`, the base of all settings, and `Component`, a union of them from which `type` picks one."""

import importlib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
)
from pydantic_core import PydanticCustomError, core_schema, to_json

from distft.errors import did_you_mean, suggest_name

EXTERNAL_TAG = "my_package.module:Class"  # a member's name cannot contain the colon
_EXTERNAL_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_TRUST = "trust"  # key of the validation context
_MOST_CHARACTERS = 80  # of a name in a message


class Settings(BaseModel):
    """A node of the configuration: immutable; an unknown key is an error.

    Fields with bounds use `Field(...)`. The comment after a field is its description in the JSON schema.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class Component:
    """Annotates a union of settings classes; `type` picks a member or names a class outside distft.

    `ScheduleConfig = Annotated[CosineConfig | ConstantConfig, Component()]`: each member has a field
    `type: Literal["..."]`. In YAML, `type: cosine` picks a member. `type: my_package.module:Class` imports a
    subclass of `Settings` and passes it the other keys; it needs the members' methods, such as `build`. That
    runs code, so it needs the validation context of `trusting(True)`; otherwise such a type is an error.
    `default` is the type of settings that name none, unless one other type alone has all of them.
    """

    def __init__(self, default: str | None = None) -> None:
        self.default = default

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
        choices[EXTERNAL_TAG] = core_schema.with_info_plain_validator_function(_validate_external)
        classes = {member: tag for tag, member in members.items()}

        def tag_of(value: Any) -> str | None:
            if isinstance(value, Settings):
                return classes.get(type(value), EXTERNAL_TAG)
            if not isinstance(value, Mapping):
                return None
            name = value.get("type", self._default_of(value, members))
            if isinstance(name, str):
                return name if name in members or ":" not in name else EXTERNAL_TAG
            return None

        def check(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
            if tag_of(value) in choices:
                return validate(value)
            raise PydanticCustomError("component_type", "{reason}", {"reason": _type_problem(value, members)})

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

    def _default_of(self, value: Mapping[str, Any], members: Mapping[str, type[Settings]]) -> str | None:
        """The default, unless all settings are those of one other member: then its type was forgotten."""
        fitting = _fitting(value, members)
        return None if len(fitting) == 1 and fitting != [self.default] else self.default

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        choices = schema["schema"]["choices"]
        tags = [tag for tag in choices if tag != EXTERNAL_TAG]
        # A class of several types is one member: each of two would be valid, and one alone may be.
        refs = {tag: handler(choices[tag]) for tag in tags}
        optional = refs.get(self.default)
        members = [
            _requiring_type(ref, optional=ref == optional)
            for number, ref in enumerate(refs.values())
            if ref not in list(refs.values())[:number]
        ]
        external = {
            "type": "object",
            "description": "An external settings class, my_package.module:Class; it gets the other keys.",
            "properties": {"type": {"type": "string", "pattern": f"^{_EXTERNAL_NAME.pattern}$"}},
            "required": ["type"],
        }
        return {"oneOf": [*members, external]}


def _requiring_type(schema: dict[str, Any], *, optional: bool) -> dict[str, Any]:
    return schema if optional else {**schema, "required": ["type"]}


def trusting(trust: bool) -> dict[str, bool]:
    """The context for pydantic's validation in which classes outside distft are imported, or refused."""
    return {_TRUST: trust}


def members_by_type(union: Any) -> dict[str, type[Settings]]:
    """The settings classes of a union (or a single class) by their `type`."""
    members = get_args(union) if get_origin(union) is not None or get_args(union) else (union,)
    found: dict[str, type[Settings]] = {}
    for member in members:
        field = (
            member.model_fields.get("type")
            if isinstance(member, type) and issubclass(member, Settings)
            else None
        )
        if field is None or get_origin(field.annotation) is not Literal:
            raise TypeError(f'{member!r} needs a field such as type: Literal["name"] = "name"')
        for tag in get_args(field.annotation):
            if tag in found or ":" in tag:
                raise TypeError(f"type {tag!r} of {member.__name__} is already taken, or contains a colon")
            found[tag] = member
    return found


def import_settings(name: str) -> type[Settings]:
    """Import the class named `my_package.module:Class`. Raises `ValueError` with the reason if that fails."""
    if not _EXTERNAL_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not of the form my_package.module:Class")
    module_name, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(
            f"module {module_name!r} cannot be imported ({type(error).__name__}: {error}); "
            "install it, or add its folder to PYTHONPATH"
        ) from error
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            raise ValueError(
                f"module {module_name!r} has no {path!r}.{suggest_name(attribute, _public_names(found))}"
            )
        found = getattr(found, attribute)
    if not (isinstance(found, type) and issubclass(found, Settings)):
        raise ValueError(f"{name} is {found!r}, not a subclass of distft.config.Settings")
    return found


def _to_json(value: Any) -> bytes:
    return to_json(value, inf_nan_mode="constants")


def _public_names(owner: Any) -> list[str]:
    return [name for name in vars(owner) if not name.startswith("_")]


def _fitting(value: Mapping[str, Any], members: Mapping[str, type[Settings]]) -> list[str]:
    """The types that have all settings of `value`."""
    return [tag for tag, member in members.items() if value and value.keys() <= member.model_fields.keys()]


def _type_problem(value: Any, members: Mapping[str, type[Settings]]) -> str:
    known = list(members)
    choices = f"{', '.join(known)}, or {EXTERNAL_TAG}"
    if not isinstance(value, Mapping):
        return f"it must be a mapping with a type ({choices})"
    if "type" not in value:
        fitting = _fitting(value, members)
        hint = f" Its settings are those of type {fitting[0]}." if len(fitting) == 1 else ""
        return f"type is missing.{hint} Choose one: {choices}"
    if not isinstance(value["type"], str):
        return f"type must be a text. Choose one: {choices}"
    tag = value["type"][:_MOST_CHARACTERS]
    return f"type {tag!r} is unknown.{did_you_mean(str(tag), known)} Choose one: {choices}"


def _validate_as_json(member: type[Settings]) -> Any:
    def validate(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        if info.mode == "json" and not isinstance(value, Settings):
            # A wrap validator receives Python data; on that, strict mode refuses a list for a tuple.
            return member.model_validate_json(_to_json(value), strict=True, context=info.context)
        return handler(value)

    return validate


def _validate_external(value: Any, info: ValidationInfo) -> Settings:
    if isinstance(value, Settings):
        return value
    try:
        if not (info.context or {}).get(_TRUST, False):
            raise ValueError(
                f"{value['type'][:_MOST_CHARACTERS]!r} names a class outside distft. Loading it runs code, "
                "and this configuration is not trusted: pass --trust if you know who wrote it"
            )
        found = import_settings(value["type"])
    except ValueError as error:
        raise PydanticCustomError("component_type", "{reason}", {"reason": f"type {error}"}) from error
    rest = {key: item for key, item in value.items() if key != "type"}
    if info.mode == "json":
        return found.model_validate_json(_to_json(rest), strict=True, context=info.context)
    return found.model_validate(rest, context=info.context)
