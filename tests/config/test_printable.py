"""Nothing that a terminal obeys or hides comes through `printable`, and what people write does."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config.printable import printable


@given(st.text())
def test_no_character_that_a_terminal_obeys_is_left(text: str) -> None:
    kinds = {
        unicodedata.category(character) for character in printable(text) if character not in "\u200c\u200d"
    }
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;x\x07", r"\x1b]0;x\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("a\nb\t", r"a\nb\t"),
        ("abc\u202egpj", r"abc\u202egpj"),
        ("\udc80", r"\udc80"),
    ],
)
def test_others_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize("text", ["", "naïve 日本語 [bold]\\n", "👩\u200d💻", "a\u00a0b", "می\u200cخواهم"])
def test_what_people_write_stays(text: str) -> None:
    assert printable(text) == text


def test_characters_to_keep_stay() -> None:
    assert printable("a\nb\x07", keep="\n") == "a\nb\\x07"
