from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.errors import ConfigError
from distft.optim.trainable import select_trainable

NAMES = [
    "embed.weight",
    *(f"blocks.{i}.{part}.weight" for i in range(12) for part in ("q", "up")),
    "classifier.weight",
]
PATTERNS = ["*", "blocks.*", "blocks.1?.*", "*.q.*", "embed*", "classifier.weight"]


@given(patterns=st.lists(st.tuples(st.booleans(), st.sampled_from(PATTERNS)), min_size=1, max_size=6))
def test_the_last_pattern_that_matches_a_name_decides_on_it(patterns: list[tuple[bool, str]]) -> None:
    expected = set()
    for name in NAMES:
        deciding = [taken_out for taken_out, pattern in patterns if fnmatchcase(name, pattern)]
        if deciding and not deciding[-1]:
            expected.add(name)
    written = ["!" * taken_out + pattern for taken_out, pattern in patterns]
    if expected:
        assert select_trainable(NAMES, written) == expected
    else:
        with pytest.raises(ConfigError, match="nothing to train"):
            select_trainable(NAMES, written)


def test_patterns_that_match_nothing_are_all_named_with_names_that_are_near() -> None:
    with pytest.raises(ConfigError) as raised:
        select_trainable(NAMES, ["clasifier*", "!blocks.12.q.weight", "*"])
    first, second = str(raised.value).splitlines()
    assert "'clasifier*' matches none of the 26" in first
    assert "'classifier.weight'" in first
    assert "'blocks.12.q.weight'" in second
    assert ".q.weight', 'blocks." in second
    assert second.endswith("; there are blocks.0 to blocks.11.")


def test_no_patterns_at_all_leave_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match=r"begin with what is to learn, such as '\*'"):
        select_trainable(NAMES, [])


def test_upper_and_lower_case_differ() -> None:
    with pytest.raises(ConfigError):
        select_trainable(NAMES, ["EMBED*"])
