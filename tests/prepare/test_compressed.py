"""Compressed corpora: the workers read the files, and give the shards of the uncompressed corpus."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

from distft.data.corpus import JsonlCorpus
from distft.data.corpus_chunks import CompressedFileChunk
from distft.prepare import TokenizeConfig, TokenizeProgress, tokenize, worker

NUM_FILES = 5


class StopError(Exception):
    pass


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JsonlCorpus.chunks, "__defaults__", (4_000,))


@pytest.fixture
def folders(corpus: Path, tmp_path: Path) -> dict[str, Path]:
    """The same rows in 5 files without compression, with gzip, and with zstandard."""
    rows = [json.loads(line)["text"] for line in corpus.read_text().splitlines()] * 2
    lines = [json.dumps({"text": f"{i} {row * 4}"}).encode() + b"\n" for i, row in enumerate(rows)]
    compress = {"plain": lambda d: d, "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}
    for kind, function in compress.items():
        (tmp_path / kind).mkdir()
        ending = "" if kind == "plain" else f".{kind}"
        for number in range(NUM_FILES):
            data = b"".join(lines[number * 48 : number * 48 + 48])
            (tmp_path / kind / f"{number}.jsonl{ending}").write_bytes(function(data))
    return {kind: tmp_path / kind for kind in compress}


def settings(rows: Path, model: str, output: Path, **others: Any) -> TokenizeConfig:
    defaults = {"corpus": JsonlCorpus(paths=(str(rows),)), "shard_tokens": 30_000, "num_workers": 1}
    return TokenizeConfig(tokenizer=model, output=str(output), **(defaults | others))


def shard_bytes(output: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(output.glob("*/*.bin"))]


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_the_shards_depend_on_neither_compression_nor_workers(
    folders: dict[str, Path], model: str, kind: str, tmp_path: Path
) -> None:
    tokenize(settings(folders["plain"], model, tmp_path / "plain-out", holdout=0.2))
    # 2 workers read whole files, 6 get the parts that the parent has read.
    for num_workers in (1, 2, 6) if kind == "gz" else (1, 2):
        output = tmp_path / f"{num_workers}-out"
        tokenize(settings(folders[kind], model, output, holdout=0.2, num_workers=num_workers))
        assert shard_bytes(output) == shard_bytes(tmp_path / "plain-out")


def test_the_parent_opens_no_compressed_file_if_there_is_one_for_each_worker(
    folders: dict[str, Path], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parts(_: CompressedFileChunk) -> Any:
        pytest.fail("the parent read a compressed file")

    monkeypatch.setattr(
        CompressedFileChunk, "parts", parts
    )  # workers are new processes, which have their own
    result = tokenize(settings(folders["gz"], model, tmp_path / "out", num_workers=2))
    assert result.train.num_documents == 240


def test_results_that_do_not_fit_into_memory_wait_on_disk(
    folders: dict[str, Path], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(folders["gz"], model, tmp_path / "out", holdout=0.2)
    spilled: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_RESULT_BYTES", 3000)
        patch.setattr(worker, "_PIECE_TOKENS", 700)
        options = worker.TokenizeOptions(
            tokenizer_path=model,
            tokenizer_fingerprint=worker.Tokenizer.load(model).fingerprint,
            bos_id=None,
            eos_id=2,
            holdout=0.2,
            spill_prefix=str(tmp_path / "spill-"),
        )
        for task in worker._tasks(config.corpus.chunks(), options, 0, whole_chunks=True):
            expected = list(worker.tokenize_chunk(task.chunk, options))
            pieces = worker._run_task(task, options)
            spilled.append(sum(isinstance(piece, worker.SpilledPiece) for piece in pieces))
            loaded = [piece.load() if isinstance(piece, worker.SpilledPiece) else piece for piece in pieces]
            for piece, other in zip(loaded, expected, strict=True):
                for found, same in ((piece.train, other.train), (piece.validation, other.validation)):
                    assert found.ids.tolist() == same.ids.tolist()
                    assert found.ids.dtype == same.ids.dtype
                    assert found.document_starts.tolist() == same.document_starts.tolist()
                    assert found.num_bytes == same.num_bytes
                assert (piece.source_bytes, piece.ends_part) == (other.source_bytes, other.ends_part)
    assert min(spilled) > 0


@pytest.mark.parametrize("stops", [(1, 1), (2, 3), (3, 8)])
@pytest.mark.parametrize("workers", [(1, 2), (2, 1), (2, 6)])
def test_resumed_work_goes_on_within_a_file_with_any_number_of_workers(
    folders: dict[str, Path], model: str, stops: tuple[int, int], workers: tuple[int, int], tmp_path: Path
) -> None:
    if workers[1] == 6 and stops != (2, 3):
        pytest.skip("one case shows it, and processes take long to start")
    tokenize(settings(folders["plain"], model, tmp_path / "plain-out", holdout=0.2))
    num_done = 0
    for stop_at, num_workers in zip(stops, workers, strict=True):
        count = itertools.count(1)

        def stop(_: TokenizeProgress, stop_at: int = stop_at, count: Any = count) -> None:
            if next(count) == stop_at:
                raise StopError

        config = settings(folders["gz"], model, tmp_path / "out", holdout=0.2, num_workers=num_workers)
        with pytest.raises(StopError):
            tokenize(config, on_progress=stop)
        num_done += stop_at
    rest: list[TokenizeProgress] = []
    config = settings(folders["gz"], model, tmp_path / "out", holdout=0.2)
    tokenize(config, on_progress=rest.append)
    num_parts = sum(len(list(chunk.parts())) for chunk in config.corpus.chunks())
    assert len(rest) == num_parts - num_done
    assert rest[-1].source_bytes == rest[-1].total_source_bytes
    assert shard_bytes(tmp_path / "out") == shard_bytes(tmp_path / "plain-out")
    assert not list((tmp_path / "out").glob("spill*"))


def test_a_compressed_file_without_text_is_passed_and_resumed_behind(model: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    for number, text in enumerate(["first", "", "third", ""]):
        data = (json.dumps({"text": text}) + "\n").encode() if text else b""
        (rows / f"{number}.jsonl.gz").write_bytes(gzip.compress(data))
    for num_workers in (1, 2, 5):
        config = settings(rows, model, tmp_path / str(num_workers), num_workers=num_workers)
        assert tokenize(config).train.num_documents == 2
