import json
from collections import Counter
from pathlib import Path

import pytest

from distft.errors import ConfigError, DataError
from distft.prepare.stdlib_task import (
    AREAS,
    Function,
    StdlibTask,
    find_functions,
    split,
    write_stdlib_task,
)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_library(root: Path, modules: dict[str, str]) -> Path:
    for name, source in modules.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


def functions_of(prefix: str, count: int) -> str:
    return "\n".join(
        f"def {prefix}_{i}(value):\n    a = value + {i}\n    b = a * 2\n    return b\n" for i in range(count)
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StdlibTask]:
    directory = tmp_path_factory.mktemp("task")
    return directory, write_stdlib_task(directory)


def test_this_pythons_library_has_thousands_of_functions_in_at_least_twenty_areas(
    written: tuple[Path, StdlibTask],
) -> None:
    _, task = written
    assert task.num_train + task.num_test > 5000
    assert len(task.areas) >= 20
    assert sum(task.areas.values()) == task.num_train + task.num_test


def test_the_splits_do_not_overlap(written: tuple[Path, StdlibTask]) -> None:
    directory, _ = written
    train = {row["text"] for row in read(directory / "train.jsonl")}
    test = {row["text"] for row in read(directory / "test.jsonl")}
    assert train
    assert test
    assert not train & test


def test_a_fifth_of_every_area_is_in_the_test_split(
    written: tuple[Path, StdlibTask],
) -> None:
    directory, task = written
    test = Counter(row["label"] for row in read(directory / "test.jsonl"))
    assert test.keys() == task.areas.keys()
    assert all(abs(test[area] - count / 5) <= 0.5 for area, count in task.areas.items())


def test_the_same_library_gives_the_same_files(tmp_path: Path) -> None:
    areas = {"logging/a.py": functions_of("log", 50), "xml/a.py": functions_of("xml", 45)}
    library = make_library(tmp_path / "library", areas)
    for out in ("first", "second"):
        write_stdlib_task(tmp_path / out, library)
    for name in ("train.jsonl", "test.jsonl", "task.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_text_includes_decorators_and_is_dedented(tmp_path: Path) -> None:
    method = "@property\ndef area(self):\n    # pi\n    r = self.r\n    return 3 * r * r"
    body = "class Circle:\n" + "".join(f"    {line}\n" for line in method.splitlines())
    library = make_library(tmp_path, {"logging/__init__.py": body + functions_of("log", 40)})
    functions = find_functions(library)
    assert functions[0] == Function(method, "logging", "logging/__init__.py:3")


def test_the_librarys_tests_and_unparsable_files_are_skipped(tmp_path: Path) -> None:
    library = make_library(
        tmp_path,
        {
            "logging/__init__.py": functions_of("log", 40),
            "logging/test/test_log.py": functions_of("test", 40),
            "logging/broken.py": functions_of("broken", 3) + "def (",
        },
    )
    assert {function.origin.split(":")[0] for function in find_functions(library)} == {"logging/__init__.py"}


def test_short_long_and_duplicate_functions_are_skipped(tmp_path: Path) -> None:
    short = "def short():\n    return 1\n"
    long = "def long():\n" + "    work()\n" * 60
    library = make_library(
        tmp_path,
        {"logging/a.py": functions_of("f", 40), "logging/b.py": functions_of("f", 40) + short + long},
    )
    names = [function.text.split("(")[0] for function in find_functions(library)]
    assert names == [f"def f_{i}" for i in range(40)]


def test_an_area_with_too_few_functions_is_left_out(tmp_path: Path) -> None:
    library = make_library(
        tmp_path, {"logging/a.py": functions_of("log", 40), "xml/a.py": functions_of("xml", 39)}
    )
    assert {function.label for function in find_functions(library)} == {"logging"}


def test_one_new_function_moves_at_most_one_other_between_the_splits() -> None:
    functions = [Function(f"def f_{i}(): ...", "logging", f"logging/a.py:{i}") for i in range(200)]
    before = {function.text for function in split(functions[:-1])[1]}
    after = {function.text for function in split(functions)[1]}
    assert len(before ^ after) <= 2


def test_a_directory_without_a_library_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 functions in 0 known areas"):
        write_stdlib_task(tmp_path / "out", root=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl", "task.json"])
def test_other_files_with_the_names_of_the_task_are_not_overwritten(tmp_path: Path, name: str) -> None:
    modules = {"tarfile.py": functions_of("tar", 50), "argparse.py": functions_of("arg", 50)}
    library = make_library(tmp_path / "library", modules)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("of the user")
    with pytest.raises(ConfigError, match=rf"{name} would be overwritten"):
        write_stdlib_task(tmp_path / "out", root=library)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    write_stdlib_task(tmp_path / "own", root=library)
    write_stdlib_task(tmp_path / "own", root=library)  # the same content is no other file


def test_no_module_belongs_to_two_areas() -> None:
    modules = [module for _, members in AREAS for module in members.split()]
    assert len(modules) == len(set(modules))
