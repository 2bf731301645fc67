"""Tokenizes corpus chunks, in this process or in a pool of worker processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import wait
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.data.corpus_chunks import CorpusChunk, Document
from distft.data.shards import token_dtype
from distft.errors import DataError, TrainingError
from distft.tokenizer import Tokenizer

_HOLDOUT_SALT = "holdout"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeOptions:
    """How a worker turns documents into tokens."""

    tokenizer_path: str
    tokenizer_fingerprint: str
    bos_id: int | None  # before each document; None: nothing
    eos_id: int | None  # after each document; None: nothing
    holdout: float  # fraction of documents for validation


@dataclass(frozen=True, slots=True)
class EncodedDocuments:
    """The concatenated tokens of some documents."""

    ids: NDArray[Any]
    document_starts: NDArray[np.int64]  # positions in `ids` of the first token of each document
    num_bytes: int  # of the UTF-8 text


@dataclass(frozen=True, slots=True)
class TokenizedChunk:
    """The documents of one corpus chunk, by split."""

    source_bytes: int
    train: EncodedDocuments
    validation: EncodedDocuments


def tokenize_chunk(chunk: CorpusChunk, options: TokenizeOptions) -> TokenizedChunk:
    """Read `chunk` and encode its documents. Raises `DataError` with file and line of bad input."""
    tokenizer = _load_tokenizer(options.tokenizer_path, options.tokenizer_fingerprint)
    train, validation = _SplitEncoder(tokenizer, options), _SplitEncoder(tokenizer, options)
    for document in chunk.documents():
        is_held_out = options.holdout > 0 and document.sampling_hash(_HOLDOUT_SALT) < options.holdout
        try:
            (validation if is_held_out else train).add(document)
        except DataError as error:
            raise DataError(f"{document.origin}: {error}") from error
    return TokenizedChunk(chunk.source_bytes, train.result(), validation.result())


def tokenize_chunks(
    chunks: Iterable[CorpusChunk], options: TokenizeOptions, num_workers: int
) -> Generator[TokenizedChunk]:
    """Yield `tokenize_chunk` of each chunk, in order, computed by `num_workers` processes (1: this one).

    At most `2 * num_workers + 2` chunks are in memory.
    """
    if num_workers == 1:
        for chunk in chunks:
            yield tokenize_chunk(chunk, options)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker)
    pending: deque[Future[TokenizedChunk]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(tokenize_chunk, chunk, options))
            if len(pending) > 2 * num_workers + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise TrainingError(
            f"a tokenizer process died ({error}), often because memory ran out. "
            "Run the same command again with a smaller num_workers: it resumes where it stopped."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _SplitEncoder:
    """Encodes the documents of one split and concatenates their tokens."""

    def __init__(self, tokenizer: Tokenizer, options: TokenizeOptions) -> None:
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._bos = self._id_array(options.bos_id)
        self._eos = self._id_array(options.eos_id)
        self._arrays: list[NDArray[Any]] = []
        self._document_starts: list[int] = []
        self._num_tokens = 0
        self._num_bytes = 0

    def add(self, document: Document) -> None:
        ids = self._tokenizer.encode_array(document.text).astype(self._dtype)
        if not (len(ids) or document.continues_previous or document.continues_in_next):
            return  # some imported tokenizers drop white space
        if not document.continues_previous:
            self._document_starts.append(self._num_tokens)
            self._append(self._bos)
        self._append(ids)
        if not document.continues_in_next:
            self._append(self._eos)
        self._num_bytes += document.num_bytes

    def result(self) -> EncodedDocuments:
        ids = np.concatenate(self._arrays) if self._arrays else np.empty(0, self._dtype)
        return EncodedDocuments(ids, np.array(self._document_starts, dtype=np.int64), self._num_bytes)

    def _append(self, ids: NDArray[Any]) -> None:
        if len(ids):
            self._arrays.append(ids)
            self._num_tokens += len(ids)

    def _id_array(self, token_id: int | None) -> NDArray[Any]:
        return np.array([] if token_id is None else [token_id], dtype=self._dtype)


@lru_cache(maxsize=1)
def _load_tokenizer(path: str, fingerprint: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{path} was replaced by another tokenizer during the work: start again.")
    return tokenizer


def _start_worker() -> None:
    # Ctrl-C signals the whole process group; the parent handles it and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A worker has both ends of the queue's pipe open, so it sees no EOF when the parent is killed.
    parent = multiprocessing.parent_process()
    if parent:
        wait([parent.sentinel])
        os._exit(1)
