"""`type` picks a member of the union or an external class; both have the same errors and round trips."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import Field, ValidationError

from distft.config import Component, Settings, dump_yaml, json_schema, parse, parse_yaml
from distft.errors import ConfigError

EXTERNAL = """
from typing import Annotated, Literal
from distft.config import Component, Settings

class Ramp(Settings):
    peak_step: int
    note: str = ""

class Named(Settings):
    type: Literal["named"] = "named"
    size: float = 1.0

class Plain:
    pass

class Outer(Settings):
    inner: Annotated[Named, Component()]
"""


class Cosine(Settings):
    type: Literal["cosine"] = "cosine"
    warmup_steps: int


class Constant(Settings):
    type: Literal["constant"] = "constant"


Schedule = Annotated[Cosine | Constant, Component()]


class Outer(Settings):
    type: Literal["outer"] = "outer"
    inner: Schedule = Constant()


class Run(Settings):
    """A run."""

    schedule: Schedule = Constant()  # of the learning rate
    other: Schedule | None = None
    more: dict[str, Schedule] = Field(default_factory=dict)
    many: tuple[Schedule, ...] = ()
    alone: Annotated[Constant, Component()] = Constant()


@pytest.fixture
def external(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "external_components"
    (tmp_path / f"{name}.py").write_text(EXTERNAL)
    (tmp_path / "broken_external_components.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def error_for(raw: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(Run, raw, trust=True)
    return str(caught.value)


def test_type_picks_a_member() -> None:
    assert parse(Schedule, {"type": "cosine", "warmup_steps": 3}) == Cosine(warmup_steps=3)
    assert parse(Run, {"alone": {"type": "constant"}}) == Run()


def test_an_external_class_gets_the_other_keys_and_round_trips_through_yaml(external: str) -> None:
    raw = {
        "schedule": {"type": f"{external}:Ramp", "peak_step": 3},
        "more": {"a": {"type": f"{external}:Named", "size": 2}, "b": {"type": "constant"}},
        "many": [{"type": f"{external}:Ramp", "peak_step": 4, "note": "x"}, {"type": "constant"}],
    }
    run = parse(Run, raw, trust=True)
    assert type(run.schedule).__name__ == "Ramp"
    assert parse(Run, parse_yaml(dump_yaml(run)), trust=True) == run
    assert parse(Run, run) == run
    assert Run(schedule=run.schedule, more=run.more, many=run.many) == run


def test_an_external_module_is_imported_only_if_it_is_named(external: str) -> None:
    parse(Run, {"schedule": {"type": "constant"}})
    assert external not in sys.modules
    parse(Run, {"schedule": {"type": f"{external}:Ramp", "peak_step": 3}}, trust=True)
    assert external in sys.modules


@pytest.mark.parametrize(
    "raw",
    [
        {"schedule": {"type": "external_components:Ramp", "peak_step": 3}},
        {"schedule": {"type": "external_components:Ramp", "peak_stp": 3}},
        {"more": {"a": {"type": "external_components:Named"}}},
        {"many": [{"type": "constant"}, {"type": "broken_external_components:X"}]},
        {"alone": {"type": "external_components:Ramp.__init__", "peak_step": {"a": 1}}},
    ],
)
@pytest.mark.usefixtures("external")
def test_without_trust_nothing_that_data_names_is_imported(raw: dict[str, Any]) -> None:
    before = set(sys.modules)
    for read in (lambda: parse(Run, raw), lambda: parse(Run, raw, trust=False)):
        with pytest.raises(ConfigError, match=r"names a class outside distft.*pass --trust"):
            read()
    for validate in (Run.model_validate, lambda data: Run.model_validate_json(json.dumps(data))):
        with pytest.raises(ValidationError, match="pass --trust"):
            validate(raw)
    assert not {name for name in set(sys.modules) - before if "external" in name}


def test_trust_reaches_settings_inside_an_external_class(external: str) -> None:
    inner = {"type": f"{external}:Outer", "inner": {"type": f"{external}:Named", "size": 3}}
    run = parse(Run, {"schedule": inner}, trust=True)
    assert run.schedule.inner.size == 3  # type: ignore[union-attr]
    assert parse(Run, run) == run
    assert type(parse(Annotated[Outer | Constant, Component()], {"type": "outer"})) is Outer
    with pytest.raises(ConfigError, match="pass --trust"):
        parse(
            Annotated[Outer | Constant, Component()],
            {"type": "outer", "inner": {"type": f"{external}:Named"}},
        )


def test_errors_inside_an_external_class_have_plain_keys(external: str) -> None:
    raw = {"more": {"a": {"type": f"{external}:Ramp", "peak_stp": 3, "note": 5}}}
    assert error_for(raw).splitlines() == [
        "more.a.peak_step is missing: it has no default.",
        "more.a.note=5: must be a text; put it in quotes.",
        "more.a.peak_stp=3 is not a setting. Did you mean 'peak_step'?",
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module_here:X", "cannot be imported (ModuleNotFoundError"),
        ("broken_external_components:X", "No module named 'a_module_that_is_not_there'"),
        ("external_components:Ram", "has no 'Ram'. Did you mean 'Ramp'?"),
        ("external_components:Plain", "not a subclass of distft.config.Settings"),
        ("os:getcwd", "not a subclass of distft.config.Settings"),
        ("external_components:", "not of the form my_package.module:Class"),
    ],
)
@pytest.mark.usefixtures("external")
def test_a_class_that_cannot_be_a_component_is_an_error_with_the_reason(name: str, reason: str) -> None:
    text = error_for({"schedule": {"type": name}})
    assert text.startswith("schedule: type ")
    assert reason in text


def test_an_unknown_type_lists_the_known_ones() -> None:
    text = error_for({"schedule": {"type": "cosin"}, "other": {}, "many": [3]})
    assert text.splitlines() == [
        "schedule: type 'cosin' is unknown. Did you mean 'cosine'? "
        "Choose one: cosine, constant, or my_package.module:Class.",
        "other: type is missing. Choose one: cosine, constant, or my_package.module:Class.",
        "many.0: it must be a mapping with a type (cosine, constant, or my_package.module:Class).",
    ]


def test_a_setting_of_another_member_is_told_with_the_way_to_drop_it() -> None:
    raw = {"schedule": {"type": "constant", "warmup_steps": 3}, "other": {"warmup_steps": 1}}
    assert error_for(raw) == (
        "schedule.warmup_steps=3 is a setting of type cosine, and schedule.type is constant. Leave it out; "
        "to drop all settings of another type, set the section as a whole: schedule={type: constant}.\n"
        "other: type is missing. Its settings are those of type cosine. "
        "Choose one: cosine, constant, or my_package.module:Class."
    )


def test_two_members_with_the_same_type_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="already taken"):
        parse(Annotated[Cosine | Cosine | Constant | type("Twin", (Cosine,), {}), Component()], {})


def test_the_schema_accepts_what_parse_accepts(external: str) -> None:
    schema = json_schema(Run)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema).is_valid
    assert check({"schedule": {"type": "cosine", "warmup_steps": 3}})
    assert check({"schedule": {"type": f"{external}:Ramp", "anything": 3}})
    assert check({"other": None})
    assert not check({"schedule": {"type": "cosine", "warmup_step": 3}})
    assert not check({"schedule": {"type": "cosin"}})
    assert not check({"schedulee": {"type": "constant"}})


def test_comments_and_docstrings_describe_the_schema() -> None:
    schema = json_schema(Run)
    assert schema["description"] == "A run."
    assert schema["properties"]["schedule"]["description"] == "of the learning rate"


class SeveralConfig(Settings):
    type: Literal["several"] = "several"
    names: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...] = ()


def test_a_member_accepts_lists_for_tuples_but_no_strings_for_numbers() -> None:
    union = Annotated[SeveralConfig | OtherConfig, Component()]
    raw = {"type": "several", "names": ["a", "b"], "pairs": [[1, 2]]}
    assert parse(union, raw) == SeveralConfig(names=("a", "b"), pairs=((1, 2),))
    with pytest.raises(ConfigError, match=r"pairs\.0\.1"):
        parse(union, {**raw, "pairs": [[1, "2"]]})


class OtherConfig(Settings):
    type: Literal["other"] = "other"
