"""The walls of the building: who may import whom, and how large a thing may be."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (  # a part imports from lower floors only, and nothing beside it
    {"errors"},
    {"config"},
    {"topology", "storage", "tracker", "rendezvous"},
    {"collectives"},
    {"tokenizer", "model", "data", "optim", "watch"},
    {"objective", "checkpoint", "prepare"},
    {"engine"},
    {"train"},
    {"run"},
    {"cluster"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
OWNERS = {"deepspeed": "engine", "ray": "cluster", "sentencepiece": "tokenizer", "wandb": "tracker"}
OPPONENTS = {
    ("tools/checkpoint_benchmark.py", "deepspeed"),
    ("tools/tokenize_benchmark.py", "sentencepiece"),
    ("tools/chaos_cluster.py", "ray"),
}  # what is measured against, not built on
READS_ENVIRONMENT = {"run", "cli", "cluster", "launch", "__main__"}
FORBIDDEN_WORDS = {
    "utils",
    "util",
    "helpers",
    "helper",
    "misc",
    "manager",
    "handler",
    "cfg",
    "ckpt",
    "common",
}
MOST_FUNCTION_LINES = 60
MOST_MODULE_LINES = 400

MODULES = sorted(
    path.relative_to(ROOT)
    for folder in ("distft", "launch", "tools")
    for path in (ROOT / folder).rglob("*.py")
)
DISTFT = [path for path in MODULES if path.parts[0] == "distft"]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def part_of(path: Path) -> str:
    """`distft/data/order.py` is of `data`, `launch/ray_train.py` of `launch`."""
    inside = path.parts[1:] if path.parts[0] == "distft" else path.parts
    return Path(inside[0]).stem


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Full names of all that a module imports, wherever in it, with their lines."""
    package = ".".join(path.parts[:-1])
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "importlib.import_module",
            "__import__",
        }:
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value), node.lineno


def faults_of_import(path: Path, name: str) -> str:
    """What is wrong with an import in the module at `path`; empty where nothing is."""
    part, names = part_of(path), name.split(".")
    owner = OWNERS.get(names[0])
    if owner is not None and part != owner and (str(path), names[0]) not in OPPONENTS:
        return f"{names[0]} is imported by distft/{owner}/ alone"
    return faults_of_floor(part, names) if path.parts[0] == "distft" else ""


def faults_of_floor(part: str, names: list[str]) -> str:
    """What is wrong with an import in a part of distft."""
    if names[0] in {"launch", "tools", "tests"}:
        return f"distft does not import {names[0]}"
    if names[0] != "distft" or len(names) < 2 or names[1] == part:
        return ""
    if part == "__init__":
        return "distft/__init__.py imports nothing of distft"
    if names[1] not in LEVEL:
        return f"{names[1]} has no floor: give it one in this test"
    if LEVEL[names[1]] >= LEVEL.get(part, -1):
        return f"{part} (floor {LEVEL.get(part)}) is not above {names[1]} (floor {LEVEL[names[1]]})"
    return ""


def reads_environment(path: Path) -> list[int]:
    """Lines that touch the process's environment."""
    lines = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv"}:
            lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            lines += [node.lineno for alias in node.names if alias.name in {"environ", "environb", "getenv"}]
    return lines


def test_every_module_has_a_floor() -> None:
    assert {part_of(path) for path in DISTFT} - {"__init__"} <= LEVEL.keys()


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down_and_heavy_packages_have_one_owner(path: Path) -> None:
    faults = [
        f"line {line}: {fault}" for name, line in imports(path) if (fault := faults_of_import(path, name))
    ]
    assert faults == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_the_environment_is_read_at_the_top_only(path: Path) -> None:
    assert part_of(path) in READS_ENVIRONMENT or path.parts[0] == "tools" or reads_environment(path) == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_nothing_is_global(path: Path) -> None:
    assert [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Global)] == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_functions_and_modules_fit_in_a_head(path: Path) -> None:
    long = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MOST_FUNCTION_LINES
    }
    assert long == {}
    if path in DISTFT:
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MOST_MODULE_LINES


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_names_say_what_a_thing_is(path: Path) -> None:
    words = {word for part in path.with_suffix("").parts for word in part.split("_")}
    assert words & FORBIDDEN_WORDS == set()


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_nothing_is_stored_by_pickle_except_what_others_stored(path: Path) -> None:
    allowed = path.parts[:3] == ("distft", "checkpoint", "formats")
    assert (
        allowed
        or [line for name, line in imports(path) if name.split(".")[0] in {"pickle", "dill", "joblib"}] == []
    )


@pytest.mark.parametrize(
    ("path", "name", "fault"),
    [
        ("distft/model/block.py", "distft.engine.zero.Engine", "is not above"),
        ("distft/model/block.py", "distft.data.batch", "is not above"),
        ("distft/storage/files.py", "distft.tracker", "is not above"),
        ("distft/errors.py", "distft.config", "is not above"),
        ("distft/train/step.py", "deepspeed.runtime", "engine/ alone"),
        ("launch/ray_train.py", "ray.train", "cluster/ alone"),
        ("distft/run.py", "launch.ray_train", "does not import launch"),
        ("distft/__init__.py", "distft.run", "imports nothing"),
        ("distft/train/step.py", "distft.nowhere", "has no floor"),
        ("distft/train/step.py", "distft.engine.local", ""),
        ("distft/data/order.py", "distft.data.batch", ""),
        ("tools/benchmark.py", "distft.run", ""),
        ("distft/engine/zero.py", "deepspeed", ""),
    ],
)
def test_the_walls_stand_where_they_are_drawn(path: str, name: str, fault: str) -> None:
    found = faults_of_import(Path(path), name)
    assert fault in found
    assert bool(fault) == bool(found)
