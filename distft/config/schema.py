"""The JSON schema of a configuration, with which editors complete and check the YAML."""

import inspect
import io
import tokenize
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(annotation: Any) -> dict[str, Any]:
    """The schema (draft 2020-12) of `annotation`.

    A field's description is its `Field(description=...)`, or else the comment after it in the source. A
    class's description is its docstring.
    """
    schema = TypeAdapter(annotation).json_schema(schema_generator=_Generator, mode="validation")
    return {"$schema": DIALECT, **schema}


class _Generator(GenerateJsonSchema):
    schema_dialect = DIALECT

    def model_schema(self, schema: core_schema.ModelSchema) -> dict[str, Any]:
        json = super().model_schema(schema)
        for name, comment in field_comments(schema["cls"]).items():
            field = json.get("properties", {}).get(name)
            if field is not None:
                field.setdefault("description", comment)
        return json


def field_comments(settings_class: type) -> dict[str, str]:
    """The comment after each field of a class, on the line on which the field ends.

    Empty if the source is not available.
    """
    comments: dict[str, str] = {}
    for owner in reversed(settings_class.__mro__):
        if not (hasattr(owner, "model_fields") and owner.model_fields):
            continue
        try:
            source = inspect.cleandoc("\n" + inspect.getsource(owner))
        except (OSError, TypeError):
            continue
        comments.update(_comments_in(source))
    return comments


def _comments_in(source: str) -> dict[str, str]:
    """Comments at the end of `name: type = value` statements in a class body."""
    found: dict[str, str] = {}
    statement: list[tokenize.TokenInfo] = []
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        depth += (token.type == tokenize.INDENT) - (token.type == tokenize.DEDENT)
        if token.type == tokenize.COMMENT and statement and depth == 1:
            if statement[0].type == tokenize.NAME and len(statement) > 1 and statement[1].string == ":":
                found[statement[0].string] = token.string.lstrip("# ").strip()
        elif token.type in {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}:
            statement = []
        elif token.type not in {tokenize.NL, tokenize.COMMENT}:
            statement.append(token)
    return found
