"""`type` picks one of ours, or a class from outside, with the same errors and the same round trip."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from pydantic import Field

from distft.config import Part, Settings, dump_yaml, json_schema, parse, parse_yaml
from distft.errors import ConfigError

OUTSIDE = """
from typing import Literal
from distft.config import Settings

class Ramp(Settings):
    peak_step: int
    note: str = ""

class Named(Settings):
    type: Literal["named"] = "named"
    size: float = 1.0

class Plain:
    pass
"""


class Cosine(Settings):
    type: Literal["cosine"] = "cosine"
    warmup_steps: int


class Constant(Settings):
    type: Literal["constant"] = "constant"


Schedule = Annotated[Cosine | Constant, Part()]


class Run(Settings):
    """A run."""

    schedule: Schedule = Constant()  # of the learning rate
    other: Schedule | None = None
    more: dict[str, Schedule] = Field(default_factory=dict)
    many: tuple[Schedule, ...] = ()
    alone: Annotated[Constant, Part()] = Constant()


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "outside_parts_of_a_test"
    (tmp_path / f"{name}.py").write_text(OUTSIDE)
    (tmp_path / "broken_parts_of_a_test.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def fault(raw: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(Run, raw)
    return str(caught.value)


def test_type_picks_a_member() -> None:
    assert parse(Schedule, {"type": "cosine", "warmup_steps": 3}) == Cosine(warmup_steps=3)
    assert parse(Run, {"alone": {"type": "constant"}}) == Run()


def test_an_outside_class_gets_the_other_keys_and_comes_back_from_yaml(outside: str) -> None:
    raw = {
        "schedule": {"type": f"{outside}:Ramp", "peak_step": 3},
        "more": {"a": {"type": f"{outside}:Named", "size": 2}, "b": {"type": "constant"}},
        "many": [{"type": f"{outside}:Ramp", "peak_step": 4, "note": "x"}, {"type": "constant"}],
    }
    run = parse(Run, raw)
    assert type(run.schedule).__name__ == "Ramp"
    assert parse(Run, parse_yaml(dump_yaml(run))) == run
    assert parse(Run, run) == run
    assert Run(schedule=run.schedule, more=run.more, many=run.many) == run


def test_an_outside_module_is_imported_only_where_it_is_named(outside: str) -> None:
    parse(Run, {"schedule": {"type": "constant"}})
    assert outside not in sys.modules
    parse(Run, {"schedule": {"type": f"{outside}:Ramp", "peak_step": 3}})
    assert outside in sys.modules


def test_faults_inside_an_outside_class_have_plain_keys(outside: str) -> None:
    raw = {"more": {"a": {"type": f"{outside}:Ramp", "peak_stp": 3, "note": 5}}}
    assert fault(raw).splitlines() == [
        "more.a.peak_step is missing: it has no default.",
        "more.a.note=5: Input should be a valid string; put it in quotes.",
        "more.a.peak_stp=3 is not a setting. Did you mean 'peak_step'?",
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no_such_module_here:X", "cannot be imported (ModuleNotFoundError"),
        ("broken_parts_of_a_test:X", "No module named 'a_module_that_is_not_there'"),
        ("outside_parts_of_a_test:Ram", "has no 'Ram'. Did you mean 'Ramp'?"),
        ("outside_parts_of_a_test:Plain", "not a subclass of distft.config.Settings"),
        ("os:getcwd", "not a subclass of distft.config.Settings"),
        ("outside_parts_of_a_test:", "not of the form my_package.module:Class"),
    ],
)
@pytest.mark.usefixtures("outside")
def test_what_cannot_be_a_part_says_why(name: str, reason: str) -> None:
    text = fault({"schedule": {"type": name}})
    assert text.startswith("schedule: type ")
    assert reason in text


def test_a_wrong_type_offers_the_known_ones() -> None:
    text = fault({"schedule": {"type": "cosin"}, "other": {}, "many": [3]})
    assert text.splitlines() == [
        "schedule: type 'cosin' is not known. Did you mean 'cosine'? "
        "Choose one: cosine, constant, or my_package.module:Class.",
        "other: type is missing. Choose one: cosine, constant, or my_package.module:Class.",
        "many.0: a mapping with a type is wanted here (type: cosine, constant, or my_package.module:Class).",
    ]


def test_two_members_of_one_type_are_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="taken"):
        parse(Annotated[Cosine | Cosine | Constant | type("Twin", (Cosine,), {}), Part()], {})


def test_the_schema_accepts_what_parse_accepts(outside: str) -> None:
    schema = json_schema(Run)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema).is_valid
    assert check({"schedule": {"type": "cosine", "warmup_steps": 3}})
    assert check({"schedule": {"type": f"{outside}:Ramp", "anything": 3}})
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


def test_a_member_takes_lists_for_its_tuples_and_no_text_for_its_numbers() -> None:
    union = Annotated[SeveralConfig | OtherConfig, Part()]
    raw = {"type": "several", "names": ["a", "b"], "pairs": [[1, 2]]}
    assert parse(union, raw) == SeveralConfig(names=("a", "b"), pairs=((1, 2),))
    with pytest.raises(ConfigError, match=r"pairs\.0\.1"):
        parse(union, {**raw, "pairs": [[1, "2"]]})


class OtherConfig(Settings):
    type: Literal["other"] = "other"
