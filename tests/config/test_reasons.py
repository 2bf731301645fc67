"""What is wrong with a setting is said in words of settings, for every kind of error that pydantic has."""

import re
from typing import Any, cast

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from pydantic_core._pydantic_core import list_all_errors  # public only inside pydantic

from distft.config.reasons import reason_of

_FOREIGN = re.compile(
    r"Input|Tuple|pydantic|array|dictionary|[Ii]nstance of|after validation|should|\bobject\b"
    r"|valid (?:integer|string|number|list)"
)
# Raised only for Python objects, or by code of a settings class: never for a value of a file.
_NOT_FOR_DATA = {
    "no_such_attribute", "needs_python_object", "get_attribute_error", "dataclass_exact_type",
    "is_instance_of", "is_subclass_of", "complex_type", "uuid_type", "decimal_type", "fraction_type",
    "datetime_object_invalid",
    "missing_sentinel_error", "json_type", "iteration_error",
}  # fmt: skip


@pytest.mark.parametrize("known", list_all_errors(), ids=lambda known: known["type"])
def test_no_kind_of_error_speaks_of_python_or_json(known: dict[str, Any]) -> None:
    if known["type"] in _NOT_FOR_DATA:
        return
    template = known.get("message_template_json") or known["message_template_python"]
    context = {name: value or "x" for name, value in (known.get("example_context") or {}).items()}
    message = re.sub(r"{(\w+)}", lambda m: str(context.get(m[1], "")), template)
    detail = {"type": known["type"], "loc": ("a",), "msg": message, "input": object(), "ctx": context}
    reason = reason_of(cast("ErrorDetails", detail))
    assert not _FOREIGN.search(reason), reason
    assert not reason.endswith((".", " "))


@pytest.mark.parametrize(
    ("annotation", "value", "reason"),
    [
        (int, 1e6, "must be an integer; write 1000000"),
        (int, "12", "must be an integer; leave out the quotes"),
        (int, "a dozen", "must be an integer"),
        (float, "1e-3", "must be a number; leave out the quotes"),
        (bool, "True", "must be true or false; leave out the quotes"),
        (bool, 1, "must be true or false"),
        (str, 3, "must be a text; put it in quotes"),
        (str, None, "must be a text; a setting without a value is null"),
        (tuple[str, ...], "lm_head.*", "must be a list, such as [a, b]; write [lm_head.*]"),
        (list[int], {"a": 1}, "must be a list, such as [a, b]"),
        (dict[str, int], [1], "must be a mapping of settings"),
    ],
)
def test_a_reason_shows_what_to_write_instead(annotation: Any, value: Any, reason: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(annotation).validate_python(value, strict=True)
    assert reason_of(caught.value.errors()[0]) == reason
