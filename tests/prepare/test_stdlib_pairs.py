import json
from pathlib import Path

import pytest

from distft.cli.main import main
from distft.data.dataset import DataContext
from distft.data.pairs import PairsConfig
from distft.errors import ConfigError, DataError
from distft.prepare.stdlib_pairs import find_pairs, module_of, split, write_stdlib_pairs

FUNCTION = '''
class Box:
    async def put(self, thing):
        """Put a thing into module {name}.

        More about it."""
        thing.check()
        return self.add(thing)

    def short(self):
        """Return nothing at all."""
        pass

def get(thing):
    if thing:
        return thing
    return None
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Thirty modules with one pair each, and files that do not count."""
    root = tmp_path / "library"
    root.mkdir()
    for number in range(30):
        source = FUNCTION.format(name=f"number {number}")
        (root / f"module{number}.py").write_text(source.replace("self.add", f"self.add{number}"))
    tests = root / "test"
    tests.mkdir()
    (tests / "test_a.py").write_text(FUNCTION.format(name="of tests"))
    (root / "broken.py").write_text("def (:\n")
    return root


def test_a_pair_is_the_first_paragraph_of_a_docstring_and_the_source_without_it(library: Path) -> None:
    (library / "nested").mkdir()
    source = (
        "def f(a,\n      b):\n    '''Adds two\n    numbers.'''\n    # by hand\n    c = a + b\n    return c\n"
    )
    (library / "nested" / "one.py").write_text(source)
    (pair,) = [pair for pair in find_pairs(library) if module_of(pair) == "nested"]
    assert pair.text == "Adds two numbers."
    assert pair.positive == "def f(a,\n      b):\n    # by hand\n    c = a + b\n    return c"
    assert pair.origin == "nested/one.py:1"


def test_modules_are_held_out_whole_and_no_docstring_or_source_is_in_both_parts(tmp_path: Path) -> None:
    root = tmp_path / "library"
    root.mkdir()
    for number in range(40):
        body = f"    x = {number // 2}\n    y = x\n    return y\n"
        text = f"Return the number {number // 3}."
        (root / f"m{number}.py").write_text(f'def f():\n    """{text}"""\n{body}')
    train, test = split(find_pairs(root))
    assert test
    for of in (module_of, lambda pair: pair.text, lambda pair: pair.positive):
        assert not {of(pair) for pair in train} & {of(pair) for pair in test}


def test_the_files_are_pairs_and_equal_libraries_give_equal_files(library: Path, tmp_path: Path) -> None:
    written = write_stdlib_pairs(tmp_path / "out", library)
    assert (written.num_train, written.num_test) == (26, 4)  # 15 % of the modules
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert write_stdlib_pairs(tmp_path / "out", library) == written
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    context = DataContext(
        seq_len=99, vocab_size=256, encode=lambda text: list(text.encode()), tokenizer_fingerprint="bytes"
    )
    data = PairsConfig(path=str(tmp_path / "out" / "test.jsonl"))
    assert data.build_for_evaluation(context).num_sequences == 4
    rows = [json.loads(line) for line in before["test.jsonl"].decode().splitlines()]
    assert {row["origin"].split(".py")[0] for row in rows} == set(written.test_modules)


def test_a_library_without_docstrings_and_a_file_of_others_are_refused(library: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="at least 2 of each are needed"):
        write_stdlib_pairs(tmp_path / "out", tmp_path / "empty")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"train\.jsonl would be overwritten"):
        write_stdlib_pairs(tmp_path / "out", library)


def test_the_command_writes_the_pairs_of_this_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["task", "-o", str(tmp_path), "--pairs"]) == 0
    assert "training pairs" in capsys.readouterr().out
    assert (tmp_path / "pairs.json").exists()
