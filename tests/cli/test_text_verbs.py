"""Corpus arguments of the command line, and the output of `distft tokenize`."""

from pathlib import Path

import pytest

from distft.cli.main import main
from distft.cli.text_verbs import corpus_from_arguments
from distft.errors import ConfigError


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz", "d.parquet"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "corpus_type"), [("*.txt", "text"), ("*.jsonl*", "jsonl"), ("*.parquet", "parquet")]
)
def test_suffixes_determine_the_corpus_type(mixed: Path, pattern: str, corpus_type: str) -> None:
    for paths in ([str(mixed / pattern)], [str(path) for path in mixed.glob(pattern)]):
        assert corpus_from_arguments(paths, "text", "file").type == corpus_type


@pytest.mark.parametrize("name", ["", "*", "[ab]*"])
def test_mixed_types_are_refused_and_no_file_is_skipped(mixed: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"CORPUS mixes jsonl( and parquet)?( and text)? files"):
        corpus_from_arguments([str(mixed / name)], "text", "file")


@pytest.mark.parametrize(("texts", "counted"), [(["a"], "1 document "), (["a", "b"], "2 documents ")])
def test_tokenize_prints_document_in_singular_or_plural(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], texts: list[str], counted: str
) -> None:
    for text in texts:
        (tmp_path / f"{text}.txt").write_text(f"{text} few words of text")
    corpus, model = str(tmp_path / "*.txt"), str(tmp_path / "a.model")
    assert main(["tokenizer", "train", corpus, "-o", model, "--algorithm", "char"]) == 0
    assert main(["tokenize", corpus, "-t", model, "-o", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert f" tokens of {counted}(" in capsys.readouterr().out


def test_a_tokenizer_replaces_only_a_tokenizer(tmp_path: Path) -> None:
    corpus, model = tmp_path / "a.txt", tmp_path / "a.model"
    corpus.write_text("a few words of text")
    train = ["tokenizer", "train", str(corpus), "--algorithm", "char", "-o"]
    assert main([*train, str(corpus)]) == 2
    assert main([*train, str(model)]) == 0
    assert main([*train, str(model)]) == 0
    assert main(["tokenizer", "import", str(model), "-o", str(corpus)]) == 2
    assert corpus.read_text() == "a few words of text"
