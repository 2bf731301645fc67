"""Manifests: the layout, what is refused in one, and what they cost."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoint_cli import FROZEN, cli
from support.damage import rank_file
from support.engine_scenarios import Scenario, run_alone

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    ParameterRecord,
    Progress,
    StateRecord,
    TokenizerRecord,
)
from distft.errors import CheckpointError, UnsupportedFormatError
from distft.storage import checksum_of_bytes


def make(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "run_id": "0123abcd",
        "progress": Progress(step=3),
        "config": {"model": {"d_model": 8}},
        "written_by": {},
        "tokenizer": TokenizerRecord(fingerprint="f", file="tokenizer.model"),
        "parameters": {
            "w": ParameterRecord(
                shape=(3, 2), trainable=True, updates=1, states={"weight": StateRecord(dtype="float32")}
            )
        },
        "files": [
            FileRecord(name="rank_00000.safetensors", num_bytes=9, checksum="x", intervals={"w": (0, 6)})
        ],
    }
    return Manifest(**{**fields, **changes})


def signed(raw: dict[str, Any]) -> bytes:
    """A manifest with this content and a right checksum, as anyone can make one."""
    raw = {key: value for key, value in raw.items() if key != "checksum"}
    checksum = checksum_of_bytes(json.dumps(raw, indent=1).encode())
    return json.dumps({**raw, "checksum": checksum}, indent=1).encode()


TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    text=TEXTS,
    labels=st.none() | st.lists(TEXTS, max_size=3),
    number=st.floats(allow_nan=False, allow_infinity=False),  # settings are finite
    name=st.from_regex(r"[a-z_][^/\\\x00-\x1f\x7f]{0,8}", fullmatch=True),
    num_files=st.integers(0, 3),
)
def test_the_quick_layout_is_that_of_json_and_is_read_again(
    text: str, labels: list[str] | None, number: float, name: str, num_files: int
) -> None:
    record = ParameterRecord(shape=(6,), trainable=True, updates=0, states={})
    manifest = make(
        config={"text": text, "number": number},
        label_names=labels,
        parameters={name: record},
        files=[
            FileRecord(name=f"rank_{i:05d}.safetensors", num_bytes=i, checksum="x", intervals={name: (0, i)})
            for i in range(num_files)
        ],
    )
    data = manifest.to_bytes()
    assert data == signed(manifest.model_dump(mode="json"))
    assert Manifest.from_bytes(data, "here") == manifest
    spaced = json.dumps(json.loads(data), indent=4).encode()  # by a program that laid it out anew
    assert Manifest.from_bytes(spaced, "here") == manifest


@pytest.mark.parametrize("position", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_a_changed_byte_anywhere_is_damage(position: float) -> None:
    data = bytearray(make().to_bytes())
    index = int(position * len(data))
    data[index] = data[index] + 1 if chr(data[index]).isalnum() else ord("7")
    with pytest.raises(CheckpointError, match=r"damaged|format_version|not a distft"):
        Manifest.from_bytes(bytes(data), "here")


def test_a_text_that_is_no_unicode_is_refused_before_anything_counts() -> None:
    with pytest.raises(CheckpointError, match=r"Nothing was committed.*lone surrogate"):
        make(label_names=["good", "\ud800"]).to_bytes()


PARAMETER: dict[str, Any] = {"shape": [1], "trainable": True, "updates": 0, "states": {}}
FILE: dict[str, Any] = {"name": "a.safetensors", "num_bytes": 1, "checksum": "x", "intervals": {}}
HOSTILE: dict[str, dict[str, Any]] = {
    "tokenizer above": {"tokenizer": {"fingerprint": "f", "file": "../../x"}},
    "tokenizer elsewhere": {"tokenizer": {"fingerprint": "f", "file": "/etc/passwd"}},
    "tokenizer is the directory": {"tokenizer": {"fingerprint": "f", "file": "."}},
    "absolute parameter": {"parameters": {"/abs": PARAMETER}},
    "parameter above": {"parameters": {"../..": PARAMETER}},
    "parameter with NUL": {"parameters": {"a\0b": PARAMETER}},
    "long parameter": {"parameters": {"a" * 300: PARAMETER}},
    "negative shape": {"parameters": {"w": {**PARAMETER, "shape": [-1]}}},
    "huge shape": {"parameters": {"w": {**PARAMETER, "shape": [1 << 40, 1 << 40]}}},
    "many dimensions": {"parameters": {"w": {**PARAMETER, "shape": [1] * 100}}},
    "attribute of torch": {"parameters": {"w": {**PARAMETER, "states": {"weight": {"dtype": "load"}}}}},
    "state above": {"parameters": {"w": {**PARAMETER, "states": {"../x": {"dtype": "float32"}}}}},
    "file above": {"files": [{**FILE, "name": "../../../x.safetensors"}]},
    "absolute file": {"files": [{**FILE, "name": "/x.safetensors"}]},
    "file twice": {"files": [FILE] * 2},
    "negative size": {"files": [{**FILE, "num_bytes": -1}]},
    "negative step": {"progress": {"step": -1}},
    "tied above": {"tied": {"../a": "w"}},
    "files are no list": {"files": {"a": 1}},
    "version is a boolean": {"format_version": True, "parameters": 3},
}


def test_the_parts_of_hostile_manifests_are_good_themselves() -> None:
    raw = {**make().model_dump(mode="json"), "parameters": {"w": PARAMETER}, "files": [FILE]}
    assert Manifest.from_bytes(signed(raw), "here").parameters.keys() == {"w"}


@pytest.mark.parametrize("name", HOSTILE)
def test_names_and_counts_of_a_file_are_validated_although_its_checksum_is_right(name: str) -> None:
    data = signed({**make().model_dump(mode="json"), **HOSTILE[name]})
    with pytest.raises(CheckpointError, match="is not a distft checkpoint's manifest"):
        Manifest.from_bytes(data, "here")


@pytest.mark.parametrize("interval", [(0, 7), (5, 2)])
def test_an_interval_that_the_parameter_does_not_have_is_refused(interval: tuple[int, int]) -> None:
    file = FileRecord(name="a.safetensors", num_bytes=1, checksum="x", intervals={"w": interval})
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot have elements . to . of 'w'"):
        Checkpoint("here", make(files=[file])).read("w", "weight", 0, 1)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b"{" * 100_000, b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"1" * 5000],
)
def test_what_is_no_manifest_is_an_error_of_ours(data: bytes) -> None:
    with pytest.raises(CheckpointError):
        Manifest.from_bytes(data, "here")


def test_a_newer_version_in_our_layout_asks_for_an_upgrade() -> None:
    data = signed({**make().model_dump(mode="json"), "format_version": 99, "new_field": 1})
    with pytest.raises(UnsupportedFormatError, match=r"format_version=99.*upgrade distft"):
        Manifest.from_bytes(data, "here")


def test_a_hostile_tokenizer_name_writes_nothing_outside_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = Path(run_alone(Scenario(), 1).save(str(tmp_path / "run" / "checkpoints")))
    raw = json.loads((commit / MANIFEST).read_bytes())
    raw["tokenizer"] = {"fingerprint": "f", "file": "../../secret"}
    (tmp_path / "run" / "secret").write_bytes(b"secret")
    (commit / MANIFEST).write_bytes(signed(raw))
    before = sorted(tmp_path.rglob("*"))
    for command in (("verify", commit), ("reshard", commit, tmp_path / "a" / "b" / "out")):
        assert cli(*command) in {1, 2}
        assert "tokenizer.file" in "".join(capsys.readouterr())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_whole_commit_is_whole_by_any_path_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with frozen weights, which lie in a directory beside it."""
    commit = Path(run_alone(FROZEN, 1).save(str(tmp_path / "run" / "checkpoints")))
    links = tmp_path / "links"
    links.mkdir()
    (links / "step").symlink_to(commit)
    (links / "run").symlink_to(tmp_path / "run")
    monkeypatch.chdir(commit)
    paths = [
        ".",
        "./",
        "..",
        "../",
        "../..",
        f"{commit}/",
        f"{commit}/.",
        str(links / "step"),
        str(links / "run"),
    ]
    for path in paths:
        assert cli("verify", path) == 0, path
    monkeypatch.chdir(links / "step")
    assert cli("verify", ".") == 0
    assert Checkpoint.open(".").find_damage() == []
    rank_file(commit).write_bytes(b"")
    assert cli("verify", ".") == 1
