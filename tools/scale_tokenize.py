"""What tokenizing and reading shards cost for 1, 10 and 100 times the work: for `tools/benchmark.py scale`.

Each case runs in a process of its own, whose peak memory is given above what it had before the work. Requests
and bytes are counted in a file system in memory that stands for an object store.
"""

import gzip
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.memory import MemoryFileSystem
from scale_checkpoint import ScaleRow

from distft.data.corpus import CHUNK_BYTES, JsonlCorpus
from distft.data.shard_layout import ShardLayout
from distft.data.shard_writer import ShardWriter
from distft.data.shards import TokenShards
from distft.prepare.work_log import LOG, WorkHeader, WorkProgress, open_log

TIMES = (1, 10, 100)
_ROW_BYTES = 1000
_SHARD_TOKENS = 1 << 16


class CountingFileSystem(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Files in memory that count what is fetched of them."""

    protocol = "counted"
    requests = 0
    num_bytes = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data: bytes = super().cat_file(path, start=start, end=end, **kwargs)
        CountingFileSystem.requests += 1
        CountingFileSystem.num_bytes += len(data)
        return data


def _jsonl(num_bytes: int, seed: int) -> bytes:
    letters = np.random.default_rng(seed).integers(97, 123, num_bytes, dtype=np.uint8).tobytes().decode()
    rows = (letters[start : start + _ROW_BYTES] for start in range(0, num_bytes, _ROW_BYTES))
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


def _put(name: str, data: bytes) -> None:
    with fsspec.open(f"counted://{name}", "wb") as file:
        file.write(data)


def corpus_parts(times: int, _: Path) -> int:
    """One JSONL file on a store, read in parts of 1 MiB; returns the number of parts."""
    _put("corpus/rows.jsonl", _jsonl(times * CHUNK_BYTES // 2, 0))
    return max(1, times // 2)


def compressed_files(times: int, _: Path) -> int:
    """Many gzip files on a store; returns their number."""
    data = gzip.compress(_jsonl(CHUNK_BYTES // 4, 0), 1)
    for number in range(times):
        _put(f"corpus/{number}.jsonl.gz", data)
    return times


def read_corpus(folder: Path, times: int) -> None:  # noqa: ARG001
    """Read every document of what the two functions above made."""
    for chunk in JsonlCorpus(paths=("counted://corpus",)).chunks():
        for part in chunk.parts():
            for _document in part.documents():
                pass


def many_shards(times: int, folder: Path) -> int:
    """Local shards; returns their number."""
    layout = ShardLayout(vocab_size=1000, tokenizer_fingerprint="x", shard_tokens=_SHARD_TOKENS)
    writer = ShardWriter(folder / "shards", layout, work="00")
    tokens = np.arange(_SHARD_TOKENS, dtype=np.uint16) % 1000
    for _ in range(10 * times):
        writer.append(tokens, np.zeros(1, np.int64), len(tokens))
    writer.commit()
    return 10 * times


def read_shards(folder: Path, times: int) -> None:  # noqa: ARG001
    """Open the shards, and read 2000 random rows of 1024 tokens."""
    shards = TokenShards.open(folder / "shards")
    starts = np.random.default_rng(0).integers(0, shards.num_tokens - 1024, 2000)
    shards.read_rows(starts, np.empty((2000, 1024), np.int64))
    CountingFileSystem.num_bytes = 2000 * 1024 * 2


def log_parts(times: int, _: Path) -> int:
    """Parts of a corpus whose progress is recorded; returns their number."""
    return 1000 * times


def write_log(folder: Path, times: int) -> None:
    """Record the progress of every part, a full shard with each hundredth, and read the record."""
    progress = WorkProgress()
    layout = ShardLayout(vocab_size=9, tokenizer_fingerprint="x", shard_tokens=1)
    writer = ShardWriter(folder / "train", layout, work="00")
    with open_log(folder) as log:
        log.begin(WorkHeader(identity={}, work="0" * 16))
        for part in range(1000 * times):
            if part % 100 == 0:
                writer.progress.shard_crc32.append(part)
            progress.num_chunks, progress.writers["train"] = part, writer.progress
            log.record(progress, synced=False)
        CountingFileSystem.num_bytes = (folder / LOG).stat().st_size
        log.load()
        log.remove()
    writer.abort()


CASES: dict[str, tuple[Callable[[int, Path], int], Callable[[Path, int], None]]] = {
    "JSONL on a store, parts of a file": (corpus_parts, read_corpus),
    "gzip on a store, files": (compressed_files, read_corpus),
    "2000 rows of local shards, shards": (many_shards, read_shards),
    "record of unfinished work, parts": (log_parts, write_log),
}


def _measure(case: str, times: int, connection: Any) -> None:
    fsspec.register_implementation("counted", CountingFileSystem)
    prepare, run = CASES[case]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        amount = prepare(times, folder)
        CountingFileSystem.requests = CountingFileSystem.num_bytes = 0
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        idle_mib = _peak_mib()
        began = time.perf_counter()
        run(folder, times)
        seconds = time.perf_counter() - began
        peak_mib = _peak_mib() - idle_mib
    counted = CountingFileSystem
    row = ScaleRow(
        case, amount, counted.requests, counted.num_bytes, round(seconds, 3), round(max(peak_mib, 0), 1)
    )
    connection.send(row)


def _peak_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def scale_rows() -> list[ScaleRow]:
    """Every case, 1, 10 and 100 times."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for case in CASES:
        for times in TIMES:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_measure, args=(case, times, sender))
            process.start()
            rows.append(receiver.recv())
            process.join()
    return rows
