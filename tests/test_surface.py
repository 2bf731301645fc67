"""The public surface: configuration keys, the JSON schema for editors, commands and their exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distft.config import dump_yaml, json_schema, parse, parse_yaml
from distft.run.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
KEYS = ROOT / "tests" / "golden" / "config_keys.txt"


def _keys(schema: dict[str, Any], node: dict[str, Any], prefix: str, seen: tuple[str, ...]) -> Iterator[str]:
    """Every dotted key below a node of the schema, those of all members of a union included."""
    if "$ref" in node:
        name = node["$ref"].rsplit("/", 1)[1]
        if name not in seen:
            yield from _keys(schema, schema["$defs"][name], prefix, (*seen, name))
        return
    for option in [*node.get("oneOf", []), *node.get("anyOf", []), *node.get("allOf", [])]:
        yield from _keys(schema, option, prefix, seen)
    if isinstance(node.get("items"), dict):
        yield from _keys(schema, node["items"], f"{prefix}.0", seen)
    for key, value in node.get("properties", {}).items():
        dotted = f"{prefix}.{key}".removeprefix(".")
        yield dotted
        yield from _keys(schema, value, dotted, seen)


def test_the_configuration_has_exactly_the_recorded_keys() -> None:
    schema = json_schema(RunConfig)
    found = "\n".join(sorted(set(_keys(schema, schema, "", ())))) + "\n"
    assert found == KEYS.read_text(), f"If this is intended, write it to {KEYS.relative_to(ROOT)}:\n{found}"


def test_the_schema_for_editors_is_up_to_date() -> None:
    written = json.loads((ROOT / "configs" / "schema.json").read_text())
    assert written == json_schema(RunConfig), "Run: distft config schema > configs/schema.json"


def _distft(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distft", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
        **options,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["submit", "--help"]])
def test_help_imports_no_heavy_package(arguments: list[str]) -> None:
    code = (
        f"import sys; from distft.cli.main import main; main({arguments}); "
        "heavy = {'torch', 'deepspeed', 'ray', 'numpy', 'wandb', 'sentencepiece'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "{config}", "train.max_step=5"], "Did you mean 'max_steps'?"),
        (["evaluate", "nowhere"], "nowhere does not exist"),
        (["tokenize", "nothing.txt", "-t", "no.model", "-o", "{out}"], "no.model"),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_a_user_error_gives_one_message_and_exit_code_2(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    paths = {"config": ROOT / "configs" / "shakespeare_char.yaml", "out": tmp_path / "out"}
    done = _distft(*(argument.format(**paths) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_config_show_prints_a_configuration_that_parses_to_the_same_settings() -> None:
    shown = _distft("config", "show", str(ROOT / "configs" / "shakespeare_char.yaml"))
    assert shown.returncode == 0, shown.stderr
    parsed = parse(RunConfig, parse_yaml(shown.stdout, source="shown"))
    assert dump_yaml(parsed) == shown.stdout
