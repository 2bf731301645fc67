"""Tokenizing a corpus: the shards do not depend on workers, chunks or interruptions."""

import inspect
import json
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.data.corpus import JsonlCorpus, MixtureCorpus, TextCorpus, WeightedCorpus
from distft.data.shard_layout import MANIFEST
from distft.data.shards import TokenShards
from distft.errors import ConfigError, DataError
from distft.prepare import TokenizeConfig, TokenizeProgress, tokenize
from distft.tokenizer import Tokenizer, TokenizerTrainConfig, train_tokenizer

TEXT = inspect.getsource(textwrap) + inspect.getsource(tempfile)
ROWS = [f"{TEXT[start : start + 700]} \u00e9\u2581 number {start}" for start in range(0, len(TEXT), 193)]
DRIVER = """
import resource
import sys
from distft.data.corpus import JsonlCorpus
from distft.prepare import TokenizeConfig, tokenize
JsonlCorpus.chunks.__defaults__ = (10_000,)
if __name__ == "__main__":
    config = TokenizeConfig.model_validate_json(sys.argv[1])
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    tokenize(config, on_progress=lambda progress: print(progress.num_tokens, flush=True))
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for algorithm in ("bpe", "unigram"):
        config = TokenizerTrainConfig(algorithm=algorithm, vocab_size=500, pad_id=0, unk_id=4, bos_id=1)
        train_tokenizer([TEXT], config, folder / f"{algorithm}.model")
    bare = TokenizerTrainConfig(algorithm="char", eos_id=None, bos_id=None)
    train_tokenizer([TEXT], bare, folder / "char.model")
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make little text give many chunks."""
    for corpus in (JsonlCorpus, TextCorpus, MixtureCorpus):
        monkeypatch.setattr(corpus.chunks, "__defaults__", (10_000,))


def settings(rows: str, model: str, output: Path, **others: Any) -> TokenizeConfig:
    if rows:
        others["corpus"] = others.get("corpus", JsonlCorpus(paths=(rows,)))
    defaults = {"shard_tokens": 9000, "num_workers": 1}
    return TokenizeConfig(tokenizer=model, output=str(output), **(defaults | others))


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def split_documents(shards: TokenShards) -> list[list[int]]:
    ends = [*shards.document_starts[1:], shards.num_tokens]
    return [shards.tokens(int(a), int(b)).tolist() for a, b in zip(shards.document_starts, ends, strict=True)]


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_shards_contain_every_document_in_order_followed_by_eos(
    rows: str, models: dict[str, str], algorithm: str, tmp_path: Path
) -> None:
    result = tokenize(settings(rows, models[algorithm], tmp_path))
    tokenizer = Tokenizer.load(models[algorithm])
    assert split_documents(result.train) == [[*tokenizer.encode(row), tokenizer.eos_id] for row in ROWS]
    assert result.validation is None
    assert result.train.num_bytes == sum(len(row.encode()) for row in ROWS)
    assert result.train.tokenizer_fingerprint == tokenizer.fingerprint
    assert Tokenizer.load(tmp_path / "tokenizer.model").fingerprint == tokenizer.fingerprint
    assert len(list((tmp_path / "train").glob("shard_*"))) > 5
    assert not list(tmp_path.glob("*unfinished*"))
    result.train.verify()


def test_bos_and_eos_follow_the_settings(rows: str, models: dict[str, str], tmp_path: Path) -> None:
    model = models["bpe"]
    tokenizer = Tokenizer.load(model)
    bare = tokenize(settings(rows, model, tmp_path / "a", append_eos=False)).train
    both = tokenize(settings(rows, model, tmp_path / "b", append_eos=True, prepend_bos=True)).train
    assert split_documents(bare) == [tokenizer.encode(row) for row in ROWS]
    assert split_documents(both) == [[1, *tokenizer.encode(row), 2] for row in ROWS]
    char = tokenize(settings(rows, models["char"], tmp_path / "c")).train
    assert char.eos_id is None
    assert char.num_tokens == sum(map(len, map(Tokenizer.load(models["char"]).encode, ROWS)))
    with pytest.raises(ConfigError) as caught:
        tokenize(settings(rows, models["char"], tmp_path / "d", append_eos=True, prepend_bos=True))
    assert len(str(caught.value).splitlines()) == 2


def test_the_files_do_not_depend_on_the_number_of_workers(
    rows: str, models: dict[str, str], tmp_path: Path
) -> None:
    for num_workers in (1, 2):
        output = tmp_path / str(num_workers)
        tokenize(settings(rows, models["bpe"], output, num_workers=num_workers, holdout=0.1))
    assert files_in(tmp_path / "1") == files_in(tmp_path / "2")


def test_an_error_in_a_worker_names_file_and_line(models: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": TEXT[:20_000]}) + "\n" + '{"text": 7}\n')
    for num_workers in (1, 2):
        config = settings(str(path), models["bpe"], tmp_path / str(num_workers), num_workers=num_workers)
        with pytest.raises(DataError, match=r"bad\.jsonl:2: "):
            tokenize(config)
        with pytest.raises(DataError, match="never finished"):
            TokenShards.open(tmp_path / str(num_workers) / "train")


def test_no_repetition_of_a_held_out_document_is_in_the_training_split(
    rows: str, models: dict[str, str], tmp_path: Path
) -> None:
    source = WeightedCorpus(corpus=JsonlCorpus(paths=(rows,)), weight=2.5)
    config = settings(
        rows, models["bpe"], tmp_path, corpus=MixtureCorpus(sources=(source, source)), holdout=0.25
    )
    result = tokenize(config)
    assert result.validation is not None
    train, validation = (
        {tuple(ids) for ids in split_documents(s)} for s in (result.train, result.validation)
    )
    assert not train & validation
    assert len(train) + len(validation) == len(ROWS)
    assert len(validation) == pytest.approx(0.25 * len(ROWS), rel=0.3)


def test_a_holdout_that_leaves_a_split_empty_is_an_error(models: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one document")
    corpus = TextCorpus(paths=(str(tmp_path / "one.txt"),))
    with pytest.raises(DataError, match=r"holdout=0\.5 left no document for (train|validation)"):
        tokenize(settings("", models["bpe"], tmp_path / "out", corpus=corpus, holdout=0.5))
    assert not list((tmp_path / "out").rglob(MANIFEST))
    # The failed attempt leaves nothing behind, so other settings are accepted.
    assert tokenize(settings("", models["bpe"], tmp_path / "out", corpus=corpus)).train.num_documents == 1


@pytest.mark.parametrize("algorithm", ["bpe", "char"])
def test_a_file_read_in_sections_is_one_document_with_the_ids_of_the_whole(
    models: dict[str, str], algorithm: str, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    corpus = TextCorpus(paths=(str(tmp_path / "*.txt"),), max_document_bytes=3000)
    shards = tokenize(settings("", models[algorithm], tmp_path / "out", corpus=corpus)).train
    tokenizer = Tokenizer.load(models[algorithm])
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    assert split_documents(shards) == [[*tokenizer.encode(TEXT), *end]] * 2


def test_progress_increases_to_the_totals(rows: str, models: dict[str, str], tmp_path: Path) -> None:
    seen: list[TokenizeProgress] = []
    result = tokenize(settings(rows, models["bpe"], tmp_path, holdout=0.1), on_progress=seen.append)
    assert result.validation is not None
    assert len(seen) > 10
    assert all(a.num_tokens < b.num_tokens for a, b in pairwise(seen))
    assert seen[-1].source_bytes == seen[-1].total_source_bytes == Path(rows).stat().st_size
    assert seen[-1].num_tokens == result.train.num_tokens + result.validation.num_tokens
    assert seen[-1].num_documents == len(ROWS)


class StopError(Exception):
    pass


@pytest.mark.parametrize("num_chunks", [1, 4, 11])
def test_resumed_work_gives_the_same_bytes(
    rows: str, models: dict[str, str], num_chunks: int, tmp_path: Path
) -> None:
    tokenize(settings(rows, models["bpe"], tmp_path / "uninterrupted", holdout=0.1))
    config = settings(rows, models["bpe"], tmp_path / "interrupted", holdout=0.1)
    count = iter(range(1, 1000))

    def stop(_: TokenizeProgress) -> None:
        if next(count) == num_chunks:
            raise StopError

    with pytest.raises(StopError):
        tokenize(config, on_progress=stop)
    assert not list((tmp_path / "interrupted").rglob(MANIFEST))
    again: list[TokenizeProgress] = []
    tokenize(config, on_progress=again.append)
    assert next(count) == num_chunks + 1
    assert len(again) == len(list(config.corpus.chunks())) - num_chunks
    assert files_in(tmp_path / "interrupted") == files_in(tmp_path / "uninterrupted")


@pytest.mark.parametrize("committed", [("validation",), ("validation", "train")])
def test_an_interruption_between_the_commits_is_repaired(
    rows: str,
    models: dict[str, str],
    committed: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenize(settings(rows, models["bpe"], tmp_path / "uninterrupted", holdout=0.1))
    config = settings(rows, models["bpe"], tmp_path / "interrupted", holdout=0.1)
    writer = sys.modules[tokenize.__module__].ShardWriter  # type: ignore[attr-defined]
    commit = writer.commit
    committed_splits: list[str] = []

    def commit_and_stop(self: Any, extra: Any) -> None:
        if len(committed_splits) == len(committed):
            raise StopError
        commit(self, extra)
        committed_splits.append(self._directory.name)
        if len(committed_splits) == 2:
            raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(writer, "commit", commit_and_stop)
        with pytest.raises(StopError):
            tokenize(config)
    assert tuple(committed_splits) == committed
    tokenize(config)
    assert files_in(tmp_path / "interrupted") == files_in(tmp_path / "uninterrupted")


def test_after_sigkill_no_worker_remains_and_resumed_work_gives_the_same_bytes(
    rows: str, models: dict[str, str], tmp_path: Path
) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    configs = [
        settings(rows, models["unigram"], tmp_path / name, num_workers=2, holdout=0.1)
        for name in ("uninterrupted", "interrupted")
    ]
    uninterrupted, interrupted = (
        [sys.executable, str(driver), config.model_dump_json()] for config in configs
    )
    process = subprocess.Popen(interrupted, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while processes_in_session(process.pid):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)
    process.stdout.close()
    assert not list((tmp_path / "interrupted").rglob(MANIFEST))
    resumed = subprocess.run(interrupted, capture_output=True, check=True, text=True)
    whole = subprocess.run(uninterrupted, capture_output=True, check=True, text=True)
    assert whole.stdout.endswith(resumed.stdout)
    assert len(resumed.stdout) < len(whole.stdout)
    assert files_in(tmp_path / "interrupted") == files_in(tmp_path / "uninterrupted")


def processes_in_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # the process has ended
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_work_resumes_after_a_full_disk(rows: str, models: dict[str, str], tmp_path: Path) -> None:
    tokenize(settings(rows, models["bpe"], tmp_path / "uninterrupted", shard_tokens=30_000))
    config = settings(rows, models["bpe"], tmp_path / "full", shard_tokens=30_000)
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    max_file_bytes = "50000"  # the first shard has 60,000
    command = [sys.executable, str(driver), config.model_dump_json(), max_file_bytes]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "DataError: cannot write token shards" in result.stderr
    assert "File too large" in result.stderr
    assert len(result.stdout.splitlines()) >= 1
    tokenize(config)
    assert files_in(tmp_path / "full") == files_in(tmp_path / "uninterrupted")


def test_committed_work_is_opened_not_repeated(rows: str, models: dict[str, str], tmp_path: Path) -> None:
    config = settings(rows, models["bpe"], tmp_path)
    first = tokenize(config).train
    again = tokenize(config, on_progress=lambda _: pytest.fail("it was tokenized again")).train
    assert again.num_tokens == first.num_tokens


@pytest.mark.parametrize(
    "other", [{"holdout": 0.1}, {"append_eos": False}, {"shard_tokens": 8000}, {"prepend_bos": True}]
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_work_is_kept_unless_overwrite(
    rows: str, models: dict[str, str], other: dict[str, Any], finished: bool, tmp_path: Path
) -> None:
    def stop(_: TokenizeProgress) -> None:
        if not finished:
            raise StopError

    try:
        tokenize(settings(rows, models["bpe"], tmp_path / "out"), on_progress=stop)
    except StopError:
        assert not finished
    before = files_in(tmp_path / "out")
    config = settings(rows, models["bpe"], tmp_path / "out", **other)
    with pytest.raises(ConfigError, match="shards of another corpus, tokenizer or setting"):
        tokenize(config)
    assert files_in(tmp_path / "out") == before
    tokenize(config, overwrite=True)
    tokenize(settings(rows, models["bpe"], tmp_path / "uninterrupted", **other))
    assert files_in(tmp_path / "out") == files_in(tmp_path / "uninterrupted")


def test_shards_of_another_tokenizer_or_corpus_are_refused(
    rows: str, models: dict[str, str], tmp_path: Path
) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text(Path(rows).read_text())
    tokenize(settings(str(source), models["bpe"], tmp_path / "out"))
    with pytest.raises(ConfigError, match="shards of another corpus, tokenizer or setting"):
        tokenize(settings(str(source), models["unigram"], tmp_path / "out"))
    source.write_text(Path(rows).read_text() * 2)
    with pytest.raises(ConfigError, match="shards of another corpus, tokenizer or setting"):
        tokenize(settings(str(source), models["bpe"], tmp_path / "out"))


def test_text_that_the_tokenizer_drops_gives_no_document(tmp_path: Path, models: dict[str, str]) -> None:
    (tmp_path / "a.txt").write_text("one\n\nb \u3000\n\ntwo")
    corpus = TextCorpus(paths=(str(tmp_path / "a.txt"),), documents="blank_line")
    shards = tokenize(settings("", models["char"], tmp_path / "out", corpus=corpus)).train
    assert shards.num_documents == 3
    assert np.all(np.diff(shards.document_starts) > 0)


def test_workers_do_not_import_heavy_packages() -> None:
    heavy = ("torch", "pyarrow", "ray", "pydantic", "fsspec")
    code = f"import sys, distft.prepare.worker; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
