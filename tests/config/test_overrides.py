"""An override sets the key that it names and nothing else; an impossible one is an error."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config import apply_overrides
from distft.config.overrides import join_key, split_key
from distft.config.yaml_text import to_yaml
from distft.errors import ConfigError

names = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"'), max_size=5).map(
    str.strip
)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab: [", max_size=5)
trees = st.dictionaries(
    names, st.recursive(leaves, lambda v: st.dictionaries(names, v, min_size=1, max_size=3)), max_size=4
)


def leaves_of(tree: Any, *keys: str) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, dict):
        return [(keys, tree)]
    return [leaf for name, item in tree.items() for leaf in leaves_of(item, *keys, name)]


@given(trees)
def test_overrides_of_all_leaves_reproduce_a_configuration(tree: dict[str, Any]) -> None:
    overrides = [f"{join_key(keys)}={to_yaml(leaf)}" for keys, leaf in leaves_of(tree)]
    assert apply_overrides({}, overrides) == tree


@given(st.lists(names, min_size=1))
def test_a_joined_key_splits_into_its_names(keys: list[str]) -> None:
    assert split_key(join_key(keys)) == keys


@given(trees, st.data())
def test_an_override_changes_one_leaf_and_leaves_the_original_alone(tree: dict[str, Any], data: Any) -> None:
    if not (found := leaves_of(tree)):
        return
    keys, _ = data.draw(st.sampled_from(found))
    before = copy.deepcopy(tree)
    changed = dict(leaves_of(apply_overrides(tree, [f"{join_key(keys)}=other"])))
    assert tree == before
    assert changed == {**dict(found), keys: "other"}


def test_values_are_yaml_and_the_last_one_wins() -> None:
    raw = apply_overrides({}, ["a.b=null", "a.c=[1, x]", "d=1e-3", "d=2", "e=", "f=a=b", ' g ="1"'])
    assert raw == {"a": {"b": None, "c": [1, "x"]}, "d": 2, "e": None, "f": "a=b", "g": "1"}


def test_list_elements_are_addressed_by_index() -> None:
    raw = {"data": {"sources": [{"path": "a"}, None]}}
    changed = apply_overrides(raw, ["data.sources.0.path=x", "data.sources.1.path=y"])
    assert changed == {"data": {"sources": [{"path": "x"}, {"path": "y"}]}}


def test_all_wrong_overrides_are_reported_at_once() -> None:
    raw = {"a": 1, "list": [1, 2], "empty": []}
    bad = ["a", "=1", "a..b=1", '"a=1', "a.b=1", "list.2=1", "list.-1=1", "list.x.y=1", "empty.0=1", "a=[1"]
    with pytest.raises(ConfigError) as caught:
        apply_overrides(raw, [*bad, "good=1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == len(bad)
    assert "write key=value" in lines[0]
    assert lines[4] == "a.b cannot be set: a=1 is not a mapping."
    assert "0 to 1" in lines[5]
    assert lines[9].startswith("the value of a, line 1, column 3")
