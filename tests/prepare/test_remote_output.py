"""Token shards at URLs: written to and read from an S3 server, with the same tokens as local ones."""

import gzip
import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from support.s3_server import Request, S3Server

from distft.data.corpus import JsonlCorpus, ParquetCorpus, TextCorpus
from distft.data.dataset import DataContext
from distft.data.shard_layout import MANIFEST
from distft.data.shards import TokenShards
from distft.data.targets import NEXT_TOKEN
from distft.data.tokens import TokensConfig
from distft.errors import ConfigError, DataError, DistftError, StorageError
from distft.prepare import TokenizeConfig, TokenizeProgress, tokenize
from distft.prepare.output import CLAIM


class StopError(Exception):
    pass


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JsonlCorpus.chunks, "__defaults__", (4_000,))


@pytest.fixture
def bucket(s3: S3Server) -> str:
    return s3.make_bucket()


def settings(rows: Path | str, model: str, output: Any, staging: Path, **others: Any) -> TokenizeConfig:
    if rows:
        others["corpus"] = JsonlCorpus(paths=(str(rows),))
    defaults = {"shard_tokens": 5000, "num_workers": 1}
    return TokenizeConfig(tokenizer=model, output=str(output), staging=str(staging), **(defaults | others))


def local_content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def remote_content(s3: S3Server, bucket: str) -> dict[str, bytes]:
    client, name = s3.client(), bucket.removeprefix("s3://")
    keys = sorted(key for key in s3.keys(bucket) if key.startswith("out/"))
    return {key.removeprefix("out/"): client.get_object(Bucket=name, Key=key)["Body"].read() for key in keys}


def stop_after(num_parts: int) -> Any:
    count = itertools.count(1)

    def stop(_: TokenizeProgress) -> None:
        if next(count) == num_parts:
            raise StopError

    return stop


@pytest.mark.parametrize("stops", [(), (1,), (3, 8), (19,)])
def test_shards_at_a_url_are_those_of_a_directory_after_any_interruption(
    s3: S3Server, bucket: str, corpus: Path, model: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    tokenize(settings(corpus, model, tmp_path / "local", tmp_path / "staging", holdout=0.2))
    config = settings(corpus, model, f"{bucket}/out", tmp_path / "staging", holdout=0.2)
    for stop in stops:
        with pytest.raises(StopError):
            tokenize(config, on_progress=stop_after(stop))
        assert f"out/train/{MANIFEST}" not in s3.keys(bucket)
    result = tokenize(config)
    assert remote_content(s3, bucket) == local_content(tmp_path / "local")
    assert not list((tmp_path / "staging").rglob("*"))
    result.train.verify()
    assert tokenize(config).train.num_tokens == result.train.num_tokens  # it opens what is committed


def test_full_shards_leave_the_staging_directory(
    s3: S3Server, bucket: str, corpus: Path, model: str, tmp_path: Path
) -> None:
    config = settings(corpus, model, f"{bucket}/out", tmp_path / "staging", shard_tokens=2000)
    largest = 0

    def look(_: TokenizeProgress) -> None:
        nonlocal largest
        largest = max(largest, sum(p.stat().st_size for p in (tmp_path / "staging").rglob("shard*")))

    shards = tokenize(config, on_progress=look).train
    assert largest <= 2 * 2000 < shards.num_tokens
    assert s3.keys(bucket)


def test_a_failed_upload_is_sent_again_by_the_next_start(
    s3: S3Server, bucket: str, corpus: Path, model: str, tmp_path: Path
) -> None:
    tokenize(settings(corpus, model, tmp_path / "local", tmp_path / "staging"))
    config = settings(corpus, model, f"{bucket}/out", tmp_path / "staging")

    def is_affected(request: Request) -> bool:
        return request.method == "PUT" and "shard_00002" in request.path

    with s3.failing(is_affected, status=403, code="AccessDenied"), pytest.raises(StorageError):
        tokenize(config)
    tokenize(config)
    assert remote_content(s3, bucket) == local_content(tmp_path / "local")


def test_a_url_has_one_writer_at_a_time(
    s3: S3Server, bucket: str, corpus: Path, model: str, tmp_path: Path
) -> None:
    config = settings(corpus, model, f"{bucket}/out", tmp_path / "staging")
    with pytest.raises(StopError):
        tokenize(config, on_progress=stop_after(4))
    elsewhere = settings(corpus, model, f"{bucket}/out", tmp_path / "of-another-machine")
    with pytest.raises(StorageError, match="is being written by host"):
        tokenize(elsewhere)
    tokenize(elsewhere, overwrite=True).train.verify()
    taken_over = remote_content(s3, bucket)
    # The claim of the first machine is gone, and the output complete: it finds nothing left to do harm to.
    tokenize(config).train.verify()
    assert remote_content(s3, bucket) == taken_over
    assert CLAIM not in taken_over


def test_work_that_was_taken_over_commits_nothing(
    s3: S3Server, bucket: str, corpus: Path, model: str, tmp_path: Path
) -> None:
    config = settings(corpus, model, f"{bucket}/out", tmp_path / "staging")
    elsewhere = settings(corpus, model, f"{bucket}/out", tmp_path / "of-another-machine", shard_tokens=900)
    stop = stop_after(3)

    def take_over(_: TokenizeProgress) -> None:
        try:
            stop(_)
        except StopError:
            with pytest.raises(StopError):
                tokenize(elsewhere, on_progress=stop_after(2), overwrite=True)

    with pytest.raises(StorageError, match="was taken over by host"):
        tokenize(config, on_progress=take_over)
    assert f"out/train/{MANIFEST}" not in s3.keys(bucket)
    tokenize(elsewhere).train.verify()


def test_overwriting_at_a_url_replaces_the_shards_when_the_new_are_complete(
    s3: S3Server, bucket: str, corpus: Path, model: str, tmp_path: Path
) -> None:
    s3.client().put_object(Bucket=bucket.removeprefix("s3://"), Key="out/train/notes.txt", Body=b"mine")
    tokenize(settings(corpus, model, f"{bucket}/out", tmp_path / "staging", holdout=0.2))
    before = remote_content(s3, bucket)
    config = settings(corpus, model, f"{bucket}/out", tmp_path / "staging", shard_tokens=900)
    with pytest.raises(ConfigError, match="of another corpus, tokenizer or setting"):
        tokenize(config)
    with pytest.raises(StopError):
        tokenize(config, on_progress=stop_after(9), overwrite=True)
    assert remote_content(s3, bucket).items() >= before.items()
    tokenize(config)
    tokenize(settings(corpus, model, tmp_path / "local", tmp_path / "staging", shard_tokens=900))
    expected = local_content(tmp_path / "local") | {"train/notes.txt": b"mine"}
    assert remote_content(s3, bucket) == expected


def test_an_empty_split_at_a_url_leaves_nothing(
    s3: S3Server, bucket: str, model: str, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("only one document")
    only = TextCorpus(paths=(str(tmp_path / "one.txt"),))
    config = settings("", model, f"{bucket}/out", tmp_path / "staging", corpus=only, holdout=0.5)
    with pytest.raises(DataError, match="left no document"):
        tokenize(config)
    assert not s3.keys(bucket)
    assert not list((tmp_path / "staging").rglob("*"))


def test_rows_of_shards_at_a_url_are_those_of_local_ones_in_any_order(
    bucket: str, corpus: Path, model: str, tmp_path: Path
) -> None:
    local = tokenize(settings(corpus, model, tmp_path / "local", tmp_path / "s")).train
    tokenize(settings(corpus, model, f"{bucket}/out", tmp_path / "s"))
    context = DataContext(
        seq_len=64, vocab_size=512, encode=list, tokenizer_fingerprint=local.tokenizer_fingerprint
    )
    feeds = [
        TokensConfig(sources=[{"path": path}], data_seed=3).build(context)
        for path in (str(tmp_path / "local" / "train"), f"{bucket}/out/train")
    ]
    assert feeds[0].fingerprint == feeds[1].fingerprint
    # [16, 80) after [0, 16), and alone, as after a resume.
    for start, stop in ((0, 16), (16, 80), (500, 560), (16, 80)):
        there, here = (feed.batch(start, stop) for feed in feeds)
        assert torch.equal(there.input_ids, here.input_ids)
        assert torch.equal(there.targets[NEXT_TOKEN], here.targets[NEXT_TOKEN])
        assert torch.equal(there.document_ids, here.document_ids)


def test_a_row_at_a_url_costs_one_request_of_its_own_bytes(
    s3: S3Server, bucket: str, corpus: Path, model: str, tmp_path: Path
) -> None:
    tokenize(settings(corpus, model, f"{bucket}/out", tmp_path / "s", shard_tokens=1 << 20))
    shards = TokenShards.open(f"{bucket}/out/train")
    s3.requests.clear()
    out = np.empty((20, 65), np.int64)
    shards.read_rows(np.arange(20) * 64, out)
    assert Counter(request.method for request in s3.requests) == {"GET": 20}
    assert out[3].tolist() == shards.tokens(192, 257).tolist()


@pytest.mark.parametrize("name", ["shard_00001", "document_starts", MANIFEST])
def test_a_missing_file_at_a_url_is_named(
    s3: S3Server, bucket: str, corpus: Path, model: str, name: str, tmp_path: Path
) -> None:
    tokenize(settings(corpus, model, f"{bucket}/out", tmp_path / "s"))
    (key,) = [key for key in s3.keys(bucket) if key.startswith(f"out/train/{name}")]
    s3.client().delete_object(Bucket=bucket.removeprefix("s3://"), Key=key)
    with pytest.raises(DistftError, match=name):
        TokenShards.open(f"{bucket}/out/train")


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_a_corpus_on_s3_is_fetched_once(s3: S3Server, bucket: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    words = [rng.integers(97, 123, 5).astype(np.uint8).tobytes().decode() for _ in range(5000)]
    rows = [" ".join(rng.choice(words, 150)) for _ in range(12_000 if "gz" in kind else 6000)]
    if kind == "parquet":
        buffer = io.BytesIO()
        table = pyarrow.table({"text": rows, "other": rng.integers(0, 9, len(rows))})
        pyarrow.parquet.write_table(table, buffer, row_group_size=500)
        data = buffer.getvalue()
    else:
        data = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
        data = gzip.compress(data, 1) if "gz" in kind else data
    assert len(data) > 2 << 20
    s3.client().put_object(Bucket=bucket.removeprefix("s3://"), Key=f"rows.{kind}", Body=data)
    s3.requests.clear()
    fetched = s3.num_bytes_sent
    corpus = (ParquetCorpus if kind == "parquet" else JsonlCorpus)(paths=(f"{bucket}/rows.{kind}",))
    documents = [document.text for chunk in corpus.chunks(1 << 20) for document in chunk.documents()]
    assert documents == rows
    assert s3.num_bytes_sent - fetched < 1.1 * len(data)
    assert len(s3.requests) < 30
