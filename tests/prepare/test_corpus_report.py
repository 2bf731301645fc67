"""What `distft tokenize` says about its corpus: before the work what it reads, after it what it skipped."""

import gzip
import json
from pathlib import Path

import pytest

from distft.cli.main import main
from distft.data import corpus_listing
from distft.data.corpus import JsonlCorpus, MixtureCorpus, WeightedCorpus
from distft.errors import DataError
from distft.prepare import TokenizeConfig, TokenizeProgress, tokenize
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer

ROWS = ["a few words", None, "", " \n", "more words", None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "char.model"
    train_tokenizer(["a few more words"], TokenizerTrainConfig(algorithm="char"), path)
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rows = "".join(json.dumps({"text": row}) + "\n" for row in ROWS)
    folder = tmp_path / "corpus"
    (folder / "y=1").mkdir(parents=True)
    (folder / "y=1/a.jsonl").write_text(rows)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (folder / "README.md").write_text("about it")
    return folder


def test_files_are_told_before_the_work_and_skipped_rows_after_it(
    corpus: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tokenize", str(corpus), "-t", model, "-o", str(tmp_path / "out")]
    for is_complete in (False, True):
        assert main([*arguments, "--workers", "1"]) == 0
        shown = capsys.readouterr()
        lines = shown.out.splitlines()
        assert ("tokenizing:" in shown.err) is not is_complete
        assert (f"{tmp_path}/out was already complete: nothing was done." in lines) is is_complete
        assert lines[0].startswith("Reading 2 .jsonl (")
        assert lines[0].endswith(" bytes). Passed over: 1 .md.")
        assert lines[-1] == "Skipped rows without text: 4 empty, 4 null."
    assert (
        main(["tokenizer", "train", str(corpus), "-o", str(tmp_path / "b.model"), "--algorithm", "char"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[0] == lines[0]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_skipped_rows_are_counted_by_any_number_of_workers_and_across_an_interruption(
    corpus: Path, model: str, tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(JsonlCorpus.chunks, "__defaults__", (20,))
    source = JsonlCorpus(paths=(str(corpus),))
    config = TokenizeConfig(
        corpus=source, tokenizer=model, output=str(tmp_path / "out"), num_workers=num_workers
    )

    class Interruption(Exception):
        pass

    def interrupt(progress: TokenizeProgress) -> None:
        if progress.num_documents == 3:
            raise Interruption

    with pytest.raises(Interruption):
        tokenize(config, on_progress=interrupt)
    result = tokenize(config)
    assert result.train.num_documents == 4
    assert result.skipped == {"null": 4, "empty": 4}
    assert tokenize(config).skipped == result.skipped


@pytest.mark.parametrize("num_sources", [1, 2])
def test_the_files_are_listed_once_and_anew_before_the_commit(
    corpus: Path, model: str, tmp_path: Path, num_sources: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[str] = []

    def counted(pattern: str) -> corpus_listing.PathEntries:
        listed.append(pattern)
        return find_entries(pattern)

    find_entries = corpus_listing.find_entries
    monkeypatch.setattr(corpus_listing, "find_entries", counted)
    single = JsonlCorpus(paths=(str(corpus),))
    mixture = MixtureCorpus(sources=(WeightedCorpus(corpus=single, weight=2),) * num_sources)
    tokenize(TokenizeConfig(corpus=mixture, tokenizer=model, output=str(tmp_path / "out"), num_workers=1))
    assert listed == [str(corpus)] * num_sources * 2


def test_a_corpus_that_changes_meanwhile_is_not_committed(corpus: Path, model: str, tmp_path: Path) -> None:
    config = TokenizeConfig(
        corpus=JsonlCorpus(paths=(str(corpus),)), tokenizer=model, output=str(tmp_path / "out"), num_workers=1
    )

    def add_file(_: TokenizeProgress) -> None:
        (corpus / "c.jsonl").write_text('{"text": "new"}\n')

    with pytest.raises(DataError, match="the files of the corpus changed while they were tokenized"):
        tokenize(config, on_progress=add_file)
    assert not (tmp_path / "out/train/manifest.json").exists()
    assert tokenize(config, overwrite=True).train.num_documents == 5
