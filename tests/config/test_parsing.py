"""Settings round trip through YAML, and all wrong settings are reported at once."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from distft.config import Settings, dump_yaml, parse, parse_yaml
from distft.errors import ConfigError


class Cosine(Settings):
    type: Literal["cosine"] = "cosine"
    warmup_steps: int = Field(ge=0)
    final_factor: float = Field(0.1, ge=0, le=1)  # of the peak, at the last step


class Constant(Settings):
    type: Literal["constant"] = "constant"
    warmup_steps: int = 0


Schedule = Annotated[Cosine | Constant, Field(discriminator="type")]


class Source(Settings):
    path: Path
    weight: float = 1.0


class Optim(Settings):
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Schedule = Constant()


class Run(Settings):
    optim: Optim = Optim()
    sources: tuple[Source, ...] = ()
    scales: dict[str, float] = Field(default_factory=dict)
    max_steps: int = 10
    seed: int | None = None
    compile: bool = False
    note: str = ""
    limit: int | Literal["auto"] = "auto"
    held_out: Source | str = "none"
    api_key: str | None = None

    @model_validator(mode="after")
    def _is_possible(self) -> "Run":
        if self.max_steps == 13:
            raise ValueError("max_steps=13\nis unlucky")
        return self


def problems(raw: Any, where: str = "") -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(Run, raw, where=where)
    return str(caught.value).splitlines()


floats = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**63), 2**64 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]))
optims = st.builds(
    Optim,
    lr=floats,
    betas=st.tuples(floats, floats),
    schedule=st.builds(Constant, warmup_steps=integers)
    | st.builds(Cosine, warmup_steps=st.integers(0, 2**64 - 1), final_factor=st.floats(0, 1)),
)
sources = st.builds(Source, path=st.builds(Path, texts.filter(lambda t: "\0" not in t)), weight=floats)
runs = st.builds(
    Run,
    optim=optims,
    sources=st.lists(sources, max_size=3).map(tuple),
    scales=st.dictionaries(texts, floats, max_size=3),
    max_steps=integers.filter(lambda n: n != 13),
    seed=st.none() | integers,
    compile=st.booleans(),
    note=texts,
    limit=integers | st.just("auto"),
    held_out=sources | texts,
)


@given(runs)
def test_settings_round_trip_through_yaml(run: Run) -> None:
    assert parse(Run, parse_yaml(dump_yaml(run))) == run


@given(runs)
def test_settings_parse_to_themselves(run: Run) -> None:
    assert parse(Run, run) == run
    assert parse(Run, run.model_dump()) == run


def test_every_problem_has_a_line_with_key_value_and_remedy() -> None:
    raw = {
        "optim": {"lr": "fast", "schedule": {"type": "cosine", "warmup_step": 3, "final_factor": 3}},
        "sources": [{"path": "a"}, {"path": "b", "weightt": 2}],
        "max_step": 5,
        "seed": "3",
        "compile": "yes",
    }
    assert problems(raw) == [
        "optim.lr='fast': must be a number.",
        "optim.schedule.warmup_steps is missing: it has no default.",
        "optim.schedule.final_factor=3: must be at most 1.",
        "optim.schedule.warmup_step=3 is not a setting. Did you mean 'warmup_steps'?",
        "sources.1.weightt=2 is not a setting. Did you mean 'weight'?",
        "seed='3': must be an integer; leave out the quotes.",
        "compile='yes': must be true or false.",
        "max_step=5 is not a setting. Did you mean 'max_steps'?",
    ]


@pytest.mark.parametrize("value", ["3", 3.0, True, [3], {"a": 3}])
def test_other_types_are_not_converted_to_integers(value: Any) -> None:
    (problem,) = problems({"max_steps": value})
    assert problem.startswith("max_steps")
    assert "integer" in problem


def test_a_whole_float_for_an_integer_is_an_error_that_shows_the_integer() -> None:
    assert problems({"max_steps": 1e6}) == ["max_steps=1000000.0: must be an integer; write 1000000."]


def test_integers_are_accepted_as_floats_and_lists_as_tuples() -> None:
    assert parse(Optim, {"lr": 1, "betas": [0, 1]}) == Optim(lr=1.0, betas=(0.0, 1.0))


def test_numbers_in_scientific_notation_are_floats() -> None:
    assert parse(Optim, parse_yaml("lr: 1e-3")).lr == 1e-3


def test_where_is_prefixed_to_every_key() -> None:
    assert problems({"max_steps": "x", "sede": 1}, where="runs.0") == [
        "runs.0.max_steps='x': must be an integer.",
        "runs.0.sede=1 is not a setting. Did you mean 'seed'?",
    ]


def test_a_path_with_two_dots_may_be_where_it_was_read() -> None:
    assert problems({"max_steps": "x"}, where="../runs/a: train") == [
        "\"../runs/a: train\".max_steps='x': must be an integer."
    ]


def test_a_value_in_the_place_of_its_setting_is_told_which_setting_has_it() -> None:
    class Model(Settings):
        attention: Literal["causal", "bidirectional"] = "causal"
        norm: Literal["pre", "post"] | None = None

    for name, setting, known in (
        ("causal", "attention", "causal, bidirectional"),
        ("post", "norm", "pre, post"),
    ):
        with pytest.raises(ConfigError) as caught:
            parse(Model, {name: True}, where="model")
        assert str(caught.value) == (
            f"model.{name}=true is not a setting. {name} is a value of {setting}: set model.{setting} to one "
            f"of {known}."
        )


def test_an_unknown_type_suggests_a_known_one() -> None:
    (problem,) = problems({"optim": {"schedule": {"type": "cosin"}}})
    assert problem.startswith("optim.schedule: type 'cosin' is unknown. Did you mean 'cosine'?")
    (problem,) = problems({"optim": {"schedule": {}}})
    assert problem.startswith("optim.schedule: type is missing")


def test_of_a_union_only_the_best_matching_member_is_reported() -> None:
    assert problems({"held_out": {"path": "x", "weightt": 1}}) == [
        "held_out.weightt=1 is not a setting. Did you mean 'weight'?"
    ]
    (problem,) = problems({"limit": 1.5})
    assert problem.startswith("limit=1.5: ")
    assert " or " in problem


def test_keys_with_dots_are_quoted() -> None:
    assert problems({"scales": {"layers.0": "x"}}) == ["scales.\"layers.0\"='x': must be a number."]


def test_an_error_of_the_whole_configuration_is_one_line() -> None:
    assert problems({"max_steps": 13}) == ["max_steps=13 is unlucky."]
    assert problems([1]) == ["The configuration must be a mapping of settings."]


def test_a_secret_is_not_shown() -> None:
    assert problems({"api_key": 123456}) == ["api_key=***: must be a text; put it in quotes."]
    assert "hunter2" not in problems({"passwordd": "x", "password": "hunter2"})[1]


def test_self_referential_data_is_an_error() -> None:
    raw: dict[str, Any] = {}
    raw["a"] = raw
    assert "inside each other" in problems(raw)[0]
    assert "plain data" in problems({"note": object()})[0]


def test_numbers_that_no_setting_means_are_refused_by_name() -> None:
    raw = parse_yaml("optim: {lr: .inf, betas: [0, 1e400]}\nmax_steps: 0x1ffffffffffffffff\nseed: 1e18")
    assert problems(raw) == [
        "optim.lr: inf is not a finite number.",
        "optim.betas.1: inf is not a finite number.",
        "max_steps: the integer does not fit into 64 bits.",
    ]


def test_an_integer_may_be_written_with_an_exponent() -> None:
    assert parse(Run, parse_yaml("max_steps: 1e5")).max_steps == 100_000
    assert parse(Optim, parse_yaml("lr: 1e5")).lr == 100_000.0


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Run().seed = 3  # type: ignore[misc]
