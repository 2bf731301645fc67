"""Tokenizing destroys nothing: it removes its own files alone, and an output has one writer at a time."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distft.data.corpus import JsonlCorpus, TextCorpus
from distft.data.shard_layout import MANIFEST
from distft.data.shards import TokenShards
from distft.errors import ConfigError, DataError, DistftError, StorageError
from distft.prepare import TokenizeConfig, TokenizeProgress, tokenize
from distft.prepare.work_log import LOG, open_log

DRIVER = """
import sys
from distft.data.corpus import JsonlCorpus
from distft.errors import DistftError
from distft.prepare import TokenizeConfig, tokenize
JsonlCorpus.chunks.__defaults__ = (4_000,)
if __name__ == "__main__":
    config = TokenizeConfig.model_validate_json(sys.argv[1])
    def show(progress):
        print(progress.num_tokens, flush=True)
        if "wait" in sys.argv:
            sys.stdin.readline()
    try:
        tokenize(config, on_progress=show, overwrite="overwrite" in sys.argv)
    except DistftError as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


class StopError(Exception):
    pass


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JsonlCorpus.chunks, "__defaults__", (4_000,))


def settings(rows: Path, model: str, output: Path, **others: Any) -> TokenizeConfig:
    defaults = {"corpus": JsonlCorpus(paths=(str(rows),)), "shard_tokens": 5000, "num_workers": 1}
    return TokenizeConfig(tokenizer=model, output=str(output), **(defaults | others))


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stop_after(num_parts: int) -> Any:
    count = itertools.count(1)

    def stop(_: TokenizeProgress) -> None:
        if next(count) == num_parts:
            raise StopError

    return stop


def one_document(tmp_path: Path) -> TextCorpus:
    (tmp_path / "one.txt").write_text("only one document")
    return TextCorpus(paths=(str(tmp_path / "one.txt"),))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_empty_side_of_the_holdout_removes_no_file_of_the_user(
    model: str, split: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for name in (f"{split}/notes.txt", f"{split}/shard_00000.bin", f"{split}/deep/a.txt", "mine.txt"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(name)
    before = content(output)
    config = settings(tmp_path, model, output, corpus=one_document(tmp_path), holdout=0.5)
    with pytest.raises(DataError, match="left no document"):
        tokenize(config)
    assert content(output) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["train", "train/deep", "raw", "."])
def test_a_corpus_below_the_output_is_read_and_kept(
    corpus: Path, model: str, where: str, overwrite: bool, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    if overwrite:
        tokenize(settings(corpus, model, output, shard_tokens=700))
    (output / where).mkdir(parents=True, exist_ok=True)
    inside = Path(shutil.copy(corpus, output / where / "rows.jsonl"))
    result = tokenize(settings(inside, model, output), overwrite=overwrite)
    assert result.train.num_documents == 120
    assert inside.read_bytes() == corpus.read_bytes()


def test_a_foreign_shard_is_neither_removed_nor_overwritten(corpus: Path, model: str, tmp_path: Path) -> None:
    train = tmp_path / "out" / "train"
    train.mkdir(parents=True)
    foreign = ["shard_00000.bin", "shard_00001.bin", "shard_99999.bin", "document_starts.bin"]
    for name in foreign:
        (train / name).write_text("foreign")
    tokenize(settings(corpus, model, tmp_path / "out")).train.verify()
    tokenize(settings(corpus, model, tmp_path / "out", shard_tokens=900), overwrite=True).train.verify()
    assert [(train / name).read_text() for name in foreign] == ["foreign"] * 4


@pytest.mark.parametrize("link", [Path.hardlink_to, Path.symlink_to])
def test_a_corpus_that_is_a_part_of_the_output_is_refused(
    corpus: Path, model: str, link: Any, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shards = tokenize(settings(corpus, model, output)).train
    own = next((output / "train").glob("shard_00000*"))
    alias = tmp_path / "alias.txt"
    link(alias, own)
    before = content(output)
    for name in (own, alias, output / "train" / MANIFEST):
        config = settings(corpus, model, output, corpus=TextCorpus(paths=(str(corpus), str(name))))
        with pytest.raises(ConfigError, match=f"corpus file {name} is a part of output"):
            tokenize(config, overwrite=True)
    assert content(output) == before
    shards.verify()


@pytest.mark.parametrize("name", ["train/manifest.json", "tokenizer.model", LOG])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_file_with_a_name_of_the_output_is_refused_and_kept(
    corpus: Path, model: str, name: str, overwrite: bool, tmp_path: Path
) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    for foreign in ("{}", "", "x" * 1000 + "\n"):
        if name == LOG and not foreign:
            continue  # an empty log is one whose writer died at once
        path.write_text(foreign)
        with pytest.raises(DistftError, match=path.name):
            tokenize(settings(corpus, model, tmp_path / "out"), overwrite=overwrite)
        assert content(tmp_path / "out") == {name: foreign.encode()}


def test_the_tokenizer_in_the_output_may_be_the_one_that_is_named(
    corpus: Path, model: str, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    own = shutil.copy(model, output / "tokenizer.model")
    tokenize(settings(corpus, str(own), output))
    tokenize(settings(corpus, str(own), output, shard_tokens=700), overwrite=True).train.verify()


@pytest.mark.parametrize("num_parts", [1, 9])
@pytest.mark.parametrize("is_killed", [False, True])
def test_an_interrupted_overwrite_keeps_the_old_shards(
    corpus: Path, model: str, num_parts: int, is_killed: bool, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    tokenize(settings(corpus, model, output, holdout=0.2))
    before = content(output)
    config = settings(corpus, model, output, shard_tokens=900)
    if is_killed:
        process = start(tmp_path, config, "wait", "overwrite")
        for _ in range(num_parts):
            process.stdout.readline()
            process.stdin.write("\n")
            process.stdin.flush()
        process.stdout.readline()
        kill(process)
    else:
        with pytest.raises(StopError):
            tokenize(config, on_progress=stop_after(num_parts), overwrite=True)
    assert content(output).items() >= before.items()
    TokenShards.open(output / "train").verify()
    resumed: list[TokenizeProgress] = []
    tokenize(config, on_progress=resumed.append)  # goes on, and replaces them
    whole: list[TokenizeProgress] = []
    tokenize(settings(corpus, model, tmp_path / "whole", shard_tokens=900), on_progress=whole.append)
    assert content(output) == content(tmp_path / "whole")
    assert 0 < len(resumed) < len(whole)


def test_overwriting_with_the_same_settings_keeps_the_old_shards_until_the_new_are_complete(
    corpus: Path, model: str, tmp_path: Path
) -> None:
    config = settings(corpus, model, tmp_path / "out")
    old = tokenize(config).train
    before = content(tmp_path / "out")
    with pytest.raises(StopError):
        tokenize(config, on_progress=stop_after(5), overwrite=True)
    assert content(tmp_path / "out").items() >= before.items()
    new = tokenize(config, overwrite=True).train
    assert new.fingerprint == old.fingerprint
    new.verify()
    assert len(content(tmp_path / "out")) == len(before)
    assert not content(tmp_path / "out").keys() & {name for name in before if "shard" in name}


def test_a_replaced_file_that_was_changed_since_is_kept(corpus: Path, model: str, tmp_path: Path) -> None:
    tokenize(settings(corpus, model, tmp_path / "out"))
    changed = next((tmp_path / "out" / "train").glob("shard_00001*"))
    changed.write_text("someone wrote here")
    tokenize(settings(corpus, model, tmp_path / "out", shard_tokens=900), overwrite=True).train.verify()
    assert changed.read_text() == "someone wrote here"


def start(tmp_path: Path, config: TokenizeConfig, *options: str) -> "subprocess.Popen[str]":
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), config.model_dump_json(), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture
def writing(corpus: Path, model: str, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that has begun to write, and waits."""
    process = start(tmp_path, settings(corpus, model, tmp_path / "out"), "wait")
    assert process.stdout is not None
    assert process.stdout.readline()
    yield process
    kill(process)


@pytest.mark.parametrize(("overwrite", "shard_tokens"), [(False, 5000), (True, 900)])
def test_an_output_has_one_writer_at_a_time(
    writing: "subprocess.Popen[str]",
    corpus: Path,
    model: str,
    overwrite: bool,
    shard_tokens: int,
    tmp_path: Path,
) -> None:
    before = content(tmp_path / "out")
    second = settings(corpus, model, tmp_path / "out", shard_tokens=shard_tokens)
    with pytest.raises(StorageError, match=rf"is being written by another process \(pid {writing.pid} on "):
        tokenize(second, overwrite=overwrite)
    assert content(tmp_path / "out") == before
    _, errors = writing.communicate("\n" * 1000)
    assert writing.returncode == 0, errors
    tokenize(settings(corpus, model, tmp_path / "alone"))
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_two_processes_that_start_together_give_the_shards_of_one(
    corpus: Path, model: str, tmp_path: Path
) -> None:
    processes = [start(tmp_path, settings(corpus, model, tmp_path / "out")) for _ in range(2)]
    errors = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes
    for code, error in zip(codes, errors, strict=True):
        assert code == 0 or "is being written by another process" in error
    tokenize(settings(corpus, model, tmp_path / "alone"))
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_the_lock_of_a_killed_process_is_free(
    writing: "subprocess.Popen[str]", corpus: Path, model: str, tmp_path: Path
) -> None:
    kill(writing)
    tokenize(settings(corpus, model, tmp_path / "out"))
    tokenize(settings(corpus, model, tmp_path / "alone"))
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def test_a_log_that_its_holder_removed_is_not_taken_for_a_lock(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.remove()
        with open_log(tmp_path) as other:  # a new file: that of the finished work locks nothing any more
            assert other.load() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_lost_bytes", [1, 50, 400, 2000])
def test_lost_ends_of_log_and_shards_are_written_again(
    corpus: Path, model: str, num_lost_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A power failure may lose what was not synced: the log's end, or that of a shard although it is logged.
    monkeypatch.setattr("distft.prepare.pipeline._SYNC_INTERVAL_S", 0.0)
    config = settings(corpus, model, tmp_path / "out", holdout=0.2)
    with pytest.raises(StopError):
        tokenize(config, on_progress=stop_after(6))
    monkeypatch.setattr("distft.prepare.pipeline._SYNC_INTERVAL_S", 1e9)
    with pytest.raises(StopError):
        tokenize(config, on_progress=stop_after(2))
    for path in [tmp_path / "out" / LOG, max((tmp_path / "out" / "train").glob("shard*"))]:
        synced = b'"synced": true' if path.name == LOG else b""
        keep = path.read_bytes().rfind(synced) + 600 if synced else path.stat().st_size - num_lost_bytes
        os.truncate(path, min(keep, path.stat().st_size))
    tokenize(config)
    tokenize(settings(corpus, model, tmp_path / "whole", holdout=0.2))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_unfinished_work_of_an_earlier_version_is_refused_and_kept(
    corpus: Path, model: str, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "unfinished.json").write_text(json.dumps({"version": 1, "num_parts": 3}))
    with pytest.raises(ConfigError, match="unfinished work of an earlier version"):
        tokenize(settings(corpus, model, tmp_path / "out"), overwrite=True)
    assert list(content(tmp_path / "out")) == ["unfinished.json"]


@pytest.mark.parametrize("split", ["../victim", "train/../../victim", "{victim}", "train"])
def test_a_forged_log_names_no_file_to_remove(corpus: Path, model: str, tmp_path: Path, split: str) -> None:
    output, victim = tmp_path / "out", tmp_path / "victim"
    for path in (victim / "f.txt", output / "train" / "f.txt"):
        path.parent.mkdir(parents=True)
        path.write_text("mine\n")
    header = {"identity": {}, "work": "0123456789abcdef", "replaces": {split: {"f.txt": 5}}}
    holder = json.dumps({"pid": 1, "host": "x"}).ljust(255) + "\n"
    log = json.dumps(header).replace("{victim}", str(victim))
    (output / LOG).write_text(f"{holder}{log}\n")
    with pytest.raises(DistftError):
        tokenize(settings(corpus, model, output), overwrite=True)
    assert (victim / "f.txt").exists()
    assert (output / "train" / "f.txt").exists()
