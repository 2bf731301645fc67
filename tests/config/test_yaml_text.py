"""YAML is read as editors read it (1.2), and an error names line and column."""

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
        ("2E5", 200000.0),
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
    assert yaml_value(text, source="text") == value


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("a: 1\nb:\n  c: 2\n  c: 3\n", "line 4, column 3", "duplicate key 'c', first given on line 3"),
        ("a: [1, 2", "line 1, column 9", "expected"),
        ("a: !!python/object/apply:os.getcwd []", "line 1, column 4", "constructor"),
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
    with pytest.raises(ConfigError, match="contains a list"):
        parse_yaml("- 1")
    with pytest.raises(ConfigError, match="not allowed in YAML"):
        parse_yaml("a: \x00")
