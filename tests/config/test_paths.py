"""A path is the same everywhere: `~` is a home directory, and nothing else changes."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config import PathText, Settings, expand_path, parse
from distft.errors import ConfigError


class Places(Settings):
    one: PathText
    many: tuple[PathText, ...] = ()


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~", "/home/me"),
        ("~/runs/a", "/home/me/runs/a"),
        ("file://~/runs", "/home/me/runs"),
        ("./~/a", "./~/a"),
        ("runs/~a", "runs/~a"),
        ("s3://bucket/~/a", "s3://bucket/~/a"),
        ("../a", "../a"),
    ],
)
def test_a_home_directory_is_put_in_place_of_a_tilde_at_the_beginning(path: str, expanded: str) -> None:
    assert expand_path(path) == expanded
    assert parse(Places, {"one": path, "many": [path]}) == Places(one=expanded, many=(expanded,))


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
)
def test_another_path_does_not_change_and_expanding_twice_is_expanding_once(path: str) -> None:
    if not path.startswith(("~", "file://~", "local://~")):
        assert expand_path(path) == path
    else:
        try:
            once = expand_path(path)
        except ValueError:
            return
        assert expand_path(once) == once


def test_a_path_that_cannot_be_one_is_an_error_with_the_setting() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Places, {"one": "", "many": ["a\0b", "~nobody-of-this-name/x"]})
    assert str(caught.value).splitlines() == [
        "one='': a path must not be empty.",
        "many.0='a\\x00b': a path must not contain the character NUL.",
        "many.1='~nobody-of-this-name/x': ~nobody-of-this-name is not the home of a user of this machine; "
        "write ./~nobody-of-this-name/x for a file of that name.",
    ]


def test_the_home_of_another_user_is_found() -> None:
    assert expand_path("~root/x") == str(Path(os.path.expanduser("~root")) / "x")  # noqa: PTH111
