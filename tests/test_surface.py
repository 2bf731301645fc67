"""The public surface: configuration keys, the JSON schema for editors, commands and their exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from distft.cli.main import app
from distft.config import dump_yaml, json_schema, parse, parse_yaml
from distft.errors import DistftError
from distft.run.config import RunConfig
from distft.search.search_file import FileSettings

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
    for values in node.get("patternProperties", {}).values():
        yield from _keys(schema, values, f"{prefix}.NAME", seen)
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
    assert written == json_schema(FileSettings), "Run: distft config schema > configs/schema.json"


def _distft(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distft", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
        **options,
    )


HEAVY = {
    "torch",
    "deepspeed",
    "ray",
    "sentencepiece",
    "wandb",
    "pyarrow",
    "pandas",
    "transformers",
    "aiohttp",
}


def _imported_by(*arguments: str, entry: str = "distft.cli.main") -> tuple[int, set[str]]:
    """Exit code of a command, and the heavy packages that its process imported."""
    code = (
        f"import sys; from {entry} import main; code = main({list(arguments)}); "
        f"print(code, *sorted({HEAVY | {'numpy'}} & set(sys.modules)), file=sys.__stdout__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    exit_code, *imported = done.stdout.splitlines()[-1].split()
    return int(exit_code), set(imported)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["submit", "--help"]])
def test_help_imports_no_heavy_package(arguments: list[str]) -> None:
    assert _imported_by(*arguments) == (0, set())


# A command with a mistake that must be told at once, for every command that distft has. `{shakespeare}` is a
# configuration that parses, and `{nowhere}` a path at which nothing is.
MISTAKES = (
    "train {shakespeare} train.max_step=5",
    "train {nowhere}",
    "train {shakespeare} data.sources.0.path={nowhere}",
    "train {shakespeare} tokenizer={nowhere}",
    "train {shakespeare} init_from={nowhere}",
    "train {shakespeare} init_from={nowhere} model={{d_model:128}} model.max_seq_len=512",
    "config check {shakespeare} engine.type=zero engine.zero_stage=4",
    "config check {shakespeare} tokenizer={nowhere}",
    "config show {shakespeare} objective.type=classificatio",
    "tune {shakespeare}",
    "tune status {nowhere}",
    "submit {shakespeare} data.type=labelled",
    "submit {shakespeare} --address nonsense",
    "status --address nonsense",
    "logs job --address nonsense",
    "evaluate {nowhere}",
    "generate {nowhere}",
    "embed {nowhere} stdlib -o {nowhere}",
    "predict {nowhere} rows.jsonl -o {nowhere}",
    "audit {nowhere}",
    "runs {nowhere}",
    "compare {nowhere} {nowhere}",
    "report {nowhere} -o {nowhere}",
    "report {nowhere} --serve",
    "watch {nowhere} --wait 0",
    "checkpoint inspect {nowhere}",
    "checkpoint verify {nowhere}",
    "checkpoint diff {nowhere} {nowhere}",
    "checkpoint plan {nowhere}",
    "checkpoint reshard {nowhere} {nowhere}",
    "checkpoint convert {nowhere} {nowhere} --to distft",
    "checkpoint convert {exists} {nowhere} --to tensorflow",
    "checkpoint average {nowhere} {nowhere} -o {nowhere}",
    "checkpoint prune {nowhere} --keep-last 1",
    "tokenizer train {nowhere} -o {nowhere} --algorithm wordpiece",
    "tokenizer train {nowhere} -o {nowhere} --set foo=1",
    "tokenizer import {nowhere} -o {nowhere}",
    "tokenize {shakespeare} -t {nowhere} -o {nowhere}",
    "tokenize stdlib -t {nowhere} -o {nowhere} --set foo=1",
    "task",
)
_WITHOUT_MISTAKES = {"config schema"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_heavy_packages_are_imported(tmp_path: Path, mistake: str) -> None:
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists/manifest.json").touch()
    names = {
        "shakespeare": str(ROOT / "configs" / "shakespeare_char.yaml"),
        "nowhere": str(tmp_path / "nowhere"),
        "exists": str(tmp_path / "exists"),
    }
    code, imported = _imported_by(*(word.format(**names) for word in mistake.split()))
    assert code == 2
    assert not imported & HEAVY


def test_a_driver_on_ray_tells_a_mistake_before_it_imports_ray() -> None:
    config = str(ROOT / "configs" / "shakespeare_char.yaml")
    code, imported = _imported_by(config, "train.max_step=5", entry="distft.cli.ray_driver")
    assert code == 2
    assert not imported & HEAVY


def test_the_schema_is_printed_without_heavy_packages() -> None:
    code, imported = _imported_by("config", "schema")
    assert code == 0
    assert not imported & HEAVY


def _commands(group: TyperGroup) -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from (f"{name} {inner}" for inner in _commands(command))
        else:
            yield name


def test_every_command_has_a_mistake_that_is_told_at_once() -> None:
    tested = {" ".join(word for word in mistake.split()[:2] if "{" not in word) for mistake in MISTAKES}
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    commands = set(_commands(group))
    untested = {name for name in commands if not any(f"{words} ".startswith(f"{name} ") for words in tested)}
    assert untested == _WITHOUT_MISTAKES


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


PATHS = {  # parameters of commands that are paths
    "checkpoint", "checkpoints", "config", "corpus", "first", "model", "output", "run", "run_config",
    "second", "target", "tokenizer",
}  # fmt: skip


def _parameters(group: TyperGroup, *names: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _parameters(command, *names, name)
        else:
            yield from ((" ".join([*names, name]), parameter) for parameter in command.params)


def test_every_path_of_the_command_line_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere/home")
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    found = set()
    for command, parameter in _parameters(group):
        if parameter.name not in PATHS or parameter.name == "run_config":  # that is expanded when it is read
            continue
        found.add(parameter.name)
        assert parameter.callback is not None, f"{command}: {parameter.name}"
        given = ["~/x"] if parameter.name in {"checkpoints", "corpus"} else "~/x"
        try:
            seen = str(parameter.callback(typer.Context(typer.main.get_command(app)), parameter, given))
        except DistftError as error:  # nothing is at that path
            seen = str(error)
        assert "/nowhere/home/x" in seen
    assert found == PATHS - {"run_config"}


def test_a_tilde_in_a_setting_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text((ROOT / "configs" / "shakespeare_char.yaml").read_text())
    paths = ("run_dir", "tokenizer", "init_from", "checkpoint.directory", "data.sources.0.path")
    shown = _distft("config", "show", "~/run.yaml", *(f"{path}=~/some/{path}" for path in paths))
    assert shown.returncode == 0, shown.stderr
    for path in paths:
        assert f": {tmp_path}/some/{path}\n" in shown.stdout


def test_config_show_prints_a_configuration_that_parses_to_the_same_settings() -> None:
    shown = _distft("config", "show", str(ROOT / "configs" / "shakespeare_char.yaml"))
    assert shown.returncode == 0, shown.stderr
    parsed = parse(RunConfig, parse_yaml(shown.stdout, source="shown"))
    assert dump_yaml(parsed) == shown.stdout
