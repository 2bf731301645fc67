"""The public surface: configuration keys, the JSON schema for editors, commands and their exit codes."""

import contextlib
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


# Runs each command line, a JSON list on a line of the input, in a process of its own, which begins with the
# modules of the command line alone. Answers with its exit code and all modules that it has imported.
_COMMANDS = """
import importlib, json, os, sys
main = importlib.import_module(sys.argv[1]).main
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    process = os.fork()
    if process == 0:
        print(main(json.loads(line)), *sys.modules, file=answers, flush=True)
        os._exit(0)
    if os.waitpid(process, 0)[1] != 0:
        print("died", file=answers, flush=True)
"""


class _Commands:
    """Processes of commands. They share the start of Python, which takes longer than a mistake."""

    def __init__(self, entry: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMANDS, entry],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, set[str]]:
        """Exit code of a command, and the heavy packages that its process imported."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        code, *imported = self._process.stdout.readline().split()
        return int(code), (HEAVY | {"numpy"}) & set(imported)

    def close(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture(scope="module")
def commands() -> Iterator[_Commands]:
    running = _Commands("distft.cli.main")
    yield running
    running.close()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["submit", "--help"]])
def test_help_imports_no_heavy_package(commands: _Commands, arguments: list[str]) -> None:
    assert commands.run(*arguments) == (0, set())


def test_the_modules_of_a_command_are_seen(commands: _Commands) -> None:
    code, imported = commands.run("config", "check", str(ROOT / "configs" / "digits_cnn.yaml"))
    assert code == 0
    assert "torch" in imported


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
def test_a_mistake_is_told_before_heavy_packages_are_imported(
    commands: _Commands, tmp_path: Path, mistake: str
) -> None:
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists/manifest.json").touch()
    names = {
        "shakespeare": str(ROOT / "configs" / "shakespeare_char.yaml"),
        "nowhere": str(tmp_path / "nowhere"),
        "exists": str(tmp_path / "exists"),
    }
    code, imported = commands.run(*(word.format(**names) for word in mistake.split()))
    assert code == 2
    assert not imported & HEAVY


def test_a_driver_on_ray_tells_a_mistake_before_it_imports_ray() -> None:
    config = str(ROOT / "configs" / "shakespeare_char.yaml")
    with contextlib.closing(_Commands("distft.cli.ray_driver")) as driver:
        code, imported = driver.run(config, "train.max_step=5")
    assert code == 2
    assert not imported & HEAVY


def test_the_schema_is_printed_without_heavy_packages(commands: _Commands) -> None:
    code, imported = commands.run("config", "schema")
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
