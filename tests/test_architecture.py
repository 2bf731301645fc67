"""Rules for the code: which package imports which, who reads the environment, how long a function may be."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = (  # lowest first; a package imports only itself and packages of lower floors
    {"errors"},
    {"config"},
    {"topology", "storage", "rendezvous", "keyed_random"},
    {"collectives", "tracker"},
    {"tokenizer", "model", "data", "optim", "watch"},
    {"objective", "checkpoint", "prepare"},
    {"engine"},
    {"train"},
    {"run"},
    {"search"},
    {"cluster", "report"},
    {"cli"},
    {"__main__"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# The package of distft that alone imports a heavy dependency.
OWNERS = {
    "deepspeed": "engine",
    "ray": "cluster",
    "sentencepiece": "tokenizer",
    "tokenizers": "tokenizer",
    "jinja2": "tokenizer",
    "wandb": "tracker",
    "optuna": "cluster",
    "mlflow": "tracker",
    "trackio": "tracker",
}
# Tools that compare distft with the dependency, or start Ray clusters to kill their nodes.
OWNER_EXCEPTIONS = {
    ("tools/checkpoint_benchmark.py", "deepspeed"),
    ("tools/tokenize_benchmark.py", "sentencepiece"),
    ("tools/chaos_cluster.py", "ray"),
}
READS_ENVIRONMENT = {"run", "cli", "cluster", "launch", "__main__"}
MAX_FUNCTION_LINES = 60
MAX_MODULE_LINES = 400

MODULES = sorted(
    path.relative_to(ROOT)
    for folder in ("distft", "launch", "tools")
    for path in (ROOT / folder).rglob("*.py")
)
DISTFT = [path for path in MODULES if path.parts[0] == "distft"]


@functools.cache
def syntax_tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def package_of(path: Path) -> str:
    """The top-level package: `data` for `distft/data/sampler.py`, `launch` for `launch/ray_train.py`."""
    inside = path.parts[1:] if path.parts[0] == "distft" else path.parts
    return Path(inside[0]).stem


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted name and line of every import in a module, those inside functions included."""
    package = path.parts[:-1]
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], base]).rstrip(".")
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and _called(node) in {"import_module", "__import__"}:
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value), node.lineno


def _called(call: ast.Call) -> str:
    """The last name of what is called."""
    if isinstance(call.func, ast.Attribute):
        return call.func.attr
    return call.func.id if isinstance(call.func, ast.Name) else ""


def import_problem(path: Path, name: str) -> str:
    """Why the module at `path` may not import `name`; empty if it may."""
    package, names = package_of(path), name.split(".")
    owner = OWNERS.get(names[0])
    if owner is not None and package != owner and (str(path), names[0]) not in OWNER_EXCEPTIONS:
        return f"only distft/{owner}/ imports {names[0]}"
    return floor_problem(package, names) if path.parts[0] == "distft" else ""


def floor_problem(package: str, names: list[str]) -> str:
    """Why `package` of distft may not import the dotted name; empty if it may."""
    if names[0] in {"launch", "tools", "tests"}:
        return f"distft does not import {names[0]}"
    if names[0] != "distft" or len(names) < 2 or names[1] == package:
        return ""
    if package == "__init__":
        return "distft/__init__.py imports nothing of distft"
    if names[1] not in FLOOR:
        return f"{names[1]} has no floor: add it to FLOORS"
    if FLOOR[names[1]] >= FLOOR.get(package, -1):
        return f"{package} (floor {FLOOR.get(package)}) is not above {names[1]} (floor {FLOOR[names[1]]})"
    return ""


def environment_lines(path: Path) -> list[int]:
    """Lines that read or change the process's environment."""
    lines = []
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv"}:
            lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            lines += [node.lineno for alias in node.names if alias.name in {"environ", "environb", "getenv"}]
    return lines


def test_every_module_has_a_floor() -> None:
    assert {package_of(path) for path in DISTFT} - {"__init__"} <= FLOOR.keys()


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_to_lower_floors_and_heavy_dependencies_have_one_owner(path: Path) -> None:
    problems = [
        f"line {line}: {problem}" for name, line in imports(path) if (problem := import_problem(path, name))
    ]
    assert problems == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_top_packages_read_the_environment(path: Path) -> None:
    assert package_of(path) in READS_ENVIRONMENT or path.parts[0] == "tools" or environment_lines(path) == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_function_assigns_a_global(path: Path) -> None:
    assert [node.lineno for node in ast.walk(syntax_tree(path)) if isinstance(node, ast.Global)] == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_functions_and_modules_are_short(path: Path) -> None:
    too_long = {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(syntax_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    }
    assert too_long == {}
    if path in DISTFT:
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_readers_of_foreign_formats_use_pickle(path: Path) -> None:
    pickling = [line for name, line in imports(path) if name.split(".")[0] in {"pickle", "dill", "joblib"}]
    assert path.parts[:3] == ("distft", "checkpoint", "formats") or pickling == []


@pytest.mark.parametrize(
    ("path", "name", "problem"),
    [
        ("distft/model/block.py", "distft.engine.zero.Engine", "is not above"),
        ("distft/model/block.py", "distft.data.batch", "is not above"),
        ("distft/storage/files.py", "distft.tracker", "is not above"),
        ("distft/errors.py", "distft.config", "is not above"),
        ("distft/train/step.py", "deepspeed.runtime", "only distft/engine/"),
        ("launch/ray_train.py", "ray.train", "only distft/cluster/"),
        ("distft/run.py", "launch.ray_train", "does not import launch"),
        ("distft/__init__.py", "distft.run", "imports nothing"),
        ("distft/train/step.py", "distft.nowhere", "has no floor"),
        ("distft/train/step.py", "distft.engine.local", ""),
        ("distft/data/sampler.py", "distft.data.batch", ""),
        ("tools/benchmark.py", "distft.run", ""),
        ("distft/engine/zero.py", "deepspeed", ""),
    ],
)
def test_the_import_rules_refuse_and_allow_as_intended(path: str, name: str, problem: str) -> None:
    found = import_problem(Path(path), name)
    assert problem in found
    assert bool(problem) == bool(found)
