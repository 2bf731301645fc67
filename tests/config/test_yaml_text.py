"""YAML is read as editors read it (1.2), and an error names line and column."""

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distft.config import load_yaml, parse_yaml
from distft.config.yaml_text import to_yaml, yaml_value
from distft.errors import ConfigError

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.sampled_from(
        ["1e-3", "no", "010", "1:30", "<<", "=", "~", "null", "true", "0x1f", ".inf", "2020-01-01"]
    )
)
values = st.recursive(scalars, lambda v: st.lists(v) | st.dictionaries(st.text("ab.<~1e-", max_size=4), v))


@given(values)
@example(["a\x85b", {"\x85": "\u2028 \r\n"}])
def test_values_round_trip_through_yaml(value: Any) -> None:
    again = yaml_value(to_yaml(value), source="text")
    assert again == value
    assert repr(again) == repr(value)  # 1 is not 1.0, and True is not 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("2E5", 200000),
        ("1_5e3", 15000),
        ("1e+18", 10**18),
        ("1e19", 1e19),
        ("1.0e5", 100000.0),
        ("524_288", 524288),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("no", "no"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("", None),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    found = yaml_value(text, source="text")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("a: 1\nb:\n  c: 2\n  c: 3\n", "line 4, column 3", "duplicate key 'c', first given on line 3"),
        ("a: [1, 2", "line 1, column 9", "expected"),
        (
            "a: !!python/object/apply:os.getcwd []",
            "line 1, column 4",
            "the tag !!python/object/apply:os.getcwd",
        ),
        ("a: 1\n---\nb: 2", "line 2, column 1", "another document"),
        ("? [a]\n: 1", "line 1, column 3", "unhashable"),
    ],
)
def test_bad_yaml_is_an_error_with_line_and_column(
    tmp_path: Path, text: str, position: str, reason: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert str(caught.value).startswith(f"{path}, {position}: ")
    assert reason in str(caught.value)


def test_merged_keys_may_be_overridden_but_not_repeated() -> None:
    assert parse_yaml("a: &x {b: 1, c: 1}\nd: {<<: *x, b: 2}")["d"] == {"b": 2, "c": 1}


_ALIASES = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))])
_MERGES = "\n".join(
    ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 30))]
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (_ALIASES, "more than 250,000 values, counting every repetition"),
        (_MERGES, "more than 250,000 values"),
        (f"a: &a '{'x' * 300_000}'\nb: [{', '.join(['*a'] * 1000)}]", "more than 250,000 values"),
        ("a: &a [*a]", "more than 64 mappings or lists inside each other"),
        ("a: " + "[" * 5000 + "]" * 5000, "more than 64 mappings or lists inside each other"),
        ("a: " + "{b: " * 100 + "1" + "}" * 100, "more than 64 mappings or lists inside each other"),
        ("a: " + "9" * 5000, "an integer of 5000 digits does not fit into 64 bits"),
        ("a: 0x" + "f" * 5000, "an integer of 5002 digits does not fit"),
        ("a: 1e999999999999", ""),
        ("a: !!int x", "'x' is not an integer"),
        ("a: !!float x", "'x' is not a number"),
        ("a: !!binary aGk=", "the tag !!binary has no meaning here"),
        ("a: !!set {b, c}", "the tag !!set has no meaning here"),
        ("a: !!timestamp 2020-01-01", "the tag !!timestamp has no meaning here"),
        ("a: {b: 1, b: 2}", "duplicate key 'b', first given on line 1"),
        ("just words", "contains a text in place of settings"),
        ("3", "contains a number in place of settings"),
    ],
    ids=lambda value: value[:30],
)
def test_a_short_text_costs_little_and_its_problem_is_one_line(text: str, problem: str) -> None:
    tracemalloc.start()
    try:
        if problem:
            with pytest.raises(ConfigError) as caught:
                parse_yaml(text, source="run.yaml")
            assert str(caught.value).startswith("run.yaml")
            assert problem in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1
            assert len(str(caught.value)) < 300
        else:
            assert parse_yaml(text) == {"a": float("inf")}
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_only_a_regular_file_of_limited_size_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    long = tmp_path / "long.yaml"
    long.write_text("# " + "x" * (2 << 20))
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(bytes(range(256)))
    for path, reason in [
        (pipe, "no regular file"),
        ("/dev/zero", "no regular file"),
        (tmp_path, "cannot be read: Is a directory"),
        (long, "longer than 2 MiB"),
        (binary, "not UTF-8"),
        (tmp_path / ("x" * 300), "File name too long"),
        (f"{tmp_path}\0x", "null byte"),
        (
            "s3://me:pw@bucket/run.yaml",
            r"s3://\*\*\*@bucket/run.yaml: a configuration is not read from a URL",
        ),
    ]:
        with pytest.raises(ConfigError, match=reason) as caught:
            load_yaml(path)
        assert len(str(caught.value).splitlines()) == 1


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert load_yaml(path) == {"a": 1, "b": 2}


def test_an_empty_file_is_an_empty_mapping() -> None:
    assert parse_yaml("# nothing\n") == {}


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: \xe9")
    for path, reason in [
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "cannot be read"),
        (latin, "UTF-8"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            load_yaml(path)
    with pytest.raises(ConfigError, match="contains a list in place of settings"):
        parse_yaml("- 1")
    with pytest.raises(ConfigError, match="not allowed in YAML"):
        parse_yaml("a: \x00")
