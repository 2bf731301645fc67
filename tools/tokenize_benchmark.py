"""Compares `distft tokenize` with a bare sentencepiece loop: `python tools/benchmark.py tokenize`.

The bare loop has as many processes as `distft tokenize`, each with the model loaded and its share of the
texts in memory; only encoding is timed. `distft tokenize` is timed as a whole command: starting interpreters,
reading, encoding, writing, checksums and the commit.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

from distft.data import corpus as corpora
from distft.data.corpus import JsonlCorpus, StdlibCorpus
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer


def _encode(model: str, jsonl: str, shard: tuple[int, int], start: Barrier, end: Barrier) -> None:
    """Encode every `num_workers`-th text, for `shard` = (rank, num_workers), between the two barriers."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=model)
    rank, num_workers = shard
    with Path(jsonl).open() as lines:
        texts = [json.loads(line)["text"] for i, line in enumerate(lines) if i % num_workers == rank]
    start.wait()
    for text in texts:
        processor.encode(text)
    end.wait()


def bare_loop(model: str, jsonl: str, num_workers: int) -> float:
    """Seconds in which `num_workers` processes encode all texts."""
    context = multiprocessing.get_context("spawn")
    start, end = context.Barrier(num_workers + 1), context.Barrier(num_workers + 1)
    processes = [
        context.Process(target=_encode, args=(model, jsonl, (rank, num_workers), start, end))
        for rank in range(num_workers)
    ]
    for process in processes:
        process.start()
    start.wait()
    began = time.perf_counter()
    end.wait()
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    return seconds


def distft_tokenize(model: str, jsonl: str, num_workers: int, output: Path) -> float:
    """Seconds of the whole command."""
    command = [sys.executable, "-m", "distft", "tokenize", jsonl, "-t", model, "-o", str(output)]
    began = time.perf_counter()
    subprocess.run([*command, "--workers", str(num_workers)], check=True, capture_output=True)
    return time.perf_counter() - began


def tokenize_benchmark(arguments: argparse.Namespace) -> None:
    """Measure, and print table rows for docs/benchmarks.md."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        folder = Path(name)
        texts = [document.text for document in corpora.read_documents(_corpus(arguments.corpus))]
        models = {arguments.tokenizer: arguments.tokenizer} if arguments.tokenizer else {}
        for algorithm in () if models else ("bpe", "unigram"):
            models[algorithm] = str(folder / f"{algorithm}.model")
            config = TokenizerTrainConfig(algorithm=algorithm)
            train_tokenizer(iter(texts), config, models[algorithm])
        jsonl = folder / "corpus.jsonl"
        num_bytes = sum(len(text.encode()) for text in texts)
        copies = max(1, round(arguments.megabytes * 1e6 / num_bytes))
        with jsonl.open("w") as lines:
            for _ in range(copies):
                lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        megabytes = copies * num_bytes / 1e6
        print(f"{megabytes:.0f} MB, {copies * len(texts):,} documents, {arguments.workers} processes")
        first = folder / "first.jsonl"
        first.write_text(json.dumps({"text": texts[0][:100]}) + "\n")
        print("| tokenizer | bare loop, MB/s | distft tokenize, MB/s | ratio | start, s | ratio without it |")
        print("|---|---:|---:|---:|---:|---:|")
        for label, model in models.items():
            bare_s, distft_s, start_s = [], [], []
            for turn in range(arguments.turns):
                output = folder / f"{Path(model).stem}_{turn}"
                bare_s.append(bare_loop(model, str(jsonl), arguments.workers))
                distft_s.append(distft_tokenize(model, str(jsonl), arguments.workers, output))
                start_s.append(distft_tokenize(model, str(first), arguments.workers, Path(f"{output}_first")))
            bare, whole, start = min(bare_s), min(distft_s), min(start_s)
            print(
                f"| {Path(label).name} | {megabytes / bare:.1f} | {megabytes / whole:.1f} "
                f"| {bare / whole:.2f} | {start:.2f} | {bare / (whole - start):.2f} |",
                flush=True,
            )


def _corpus(path: str | None) -> StdlibCorpus | JsonlCorpus:
    return StdlibCorpus() if path is None else JsonlCorpus(paths=(path,))
