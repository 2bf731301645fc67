from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.errors import ConfigError
from distft.optim.patterns import select_trainable

NAMES = [
    "embed.weight",
    *(f"blocks.{i}.{layer}.weight" for i in range(12) for layer in ("q", "up")),
    "classifier.weight",
]
PATTERNS = ["*", "blocks.*", "blocks.1?.*", "*.q.*", "embed*", "classifier.weight"]


@given(patterns=st.lists(st.tuples(st.booleans(), st.sampled_from(PATTERNS)), min_size=1, max_size=6))
def test_the_last_pattern_that_matches_a_name_decides(patterns: list[tuple[bool, str]]) -> None:
    expected = set()
    for name in NAMES:
        matches = [is_removed for is_removed, pattern in patterns if fnmatchcase(name, pattern)]
        if matches and not matches[-1]:
            expected.add(name)
    written = ["!" * is_removed + pattern for is_removed, pattern in patterns]
    if expected:
        assert select_trainable(NAMES, written) == expected
    else:
        with pytest.raises(ConfigError, match="nothing to train"):
            select_trainable(NAMES, written)


def test_one_error_lists_all_patterns_without_a_match_and_similar_names() -> None:
    with pytest.raises(ConfigError) as raised:
        select_trainable(NAMES, ["clasifier*", "!blocks.12.q.weight", "*"])
    first, second = str(raised.value).splitlines()
    assert "'clasifier*' matches none of the 26" in first
    assert "'classifier.weight'" in first
    assert "'blocks.12.q.weight'" in second
    assert ".q.weight', 'blocks." in second
    assert second.endswith("; blocks.0 to blocks.11 exist.")


def test_no_patterns_select_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match=r"begin with the parameters to train, such as '\*'"):
        select_trainable(NAMES, [])


def test_patterns_are_case_sensitive() -> None:
    with pytest.raises(ConfigError):
        select_trainable(NAMES, ["EMBED*"])
