"""Tokenizes corpus chunks, in this process or in a pool of worker processes."""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing.connection import wait
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from distft.data.corpus_chunks import ChunkGroup, CorpusChunk, Document
from distft.data.shard_layout import token_dtype
from distft.errors import DataError, TrainingError
from distft.prepare.spill import EncodedDocuments, SpilledPiece, SpillFile, TokenizedPiece
from distft.tokenizer import Tokenizer

T = TypeVar("T")

_HOLDOUT_SALT = "holdout"
_PIECE_TOKENS = 1 << 22  # in memory at a time, and a document more
_RESULT_BYTES = 16 << 20  # of one chunk that wait in memory for their turn; the rest waits on disk
_EMPTY_CHUNK = ChunkGroup(())


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeOptions:
    """How a worker turns documents into tokens."""

    tokenizer_path: str
    tokenizer_fingerprint: str
    bos_id: int | None  # before each document; None: nothing
    eos_id: int | None  # after each document; None: nothing
    holdout: float  # fraction of documents for validation
    spill_prefix: str = ""  # of the names of files for results that do not fit into memory


@dataclass(frozen=True, slots=True)
class _Task:
    """A chunk, or a part of one, for one worker."""

    chunk: CorpusChunk
    num_skipped: int  # parts, from the first, that are done already
    ends_chunk: bool
    spill_path: str


def tokenize_chunk(
    chunk: CorpusChunk, options: TokenizeOptions, num_skipped: int = 0
) -> Iterator[TokenizedPiece]:
    """Read `chunk` without its first parts, and encode its documents. At least one piece.

    Raises `DataError` with file and line of bad input.
    """
    index = -1
    for index, part in enumerate(chunk.parts()):
        if index >= num_skipped:
            yield from _tokenize_part(part, options)
    if index < num_skipped:
        yield from _tokenize_part(_EMPTY_CHUNK, options)


def tokenize_chunks(
    chunks: Iterable[CorpusChunk],
    options: TokenizeOptions,
    num_workers: int,
    *,
    num_skipped: int = 0,
    whole_chunks: bool = False,
) -> Generator[TokenizedPiece]:
    """Yield the pieces of each chunk in order, computed by `num_workers` processes (1: this one).

    The first `num_skipped` parts of the first chunk are left out. Chunks of several parts (compressed files)
    are read by the workers if `whole_chunks`, each by one; else this process reads them, and the workers
    encode the parts. The pieces are the same. Up to `2 * num_workers + 2` tasks are waiting at a time, each
    with up to 16 MiB in memory.
    """
    if num_workers == 1:
        for chunk in chunks:
            yield from _with_end(tokenize_chunk(chunk, options, num_skipped), ends_chunk=True)
            num_skipped = 0
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker)
    pending: deque[tuple[_Task, Future[list[TokenizedPiece | SpilledPiece]]]] = deque()
    try:
        for task in _tasks(chunks, options, num_skipped, whole_chunks=whole_chunks):
            pending.append((task, pool.submit(_run_task, task, options)))
            if len(pending) > 2 * num_workers + 1:
                yield from _results(*pending.popleft())
        while pending:
            yield from _results(*pending.popleft())
    except BrokenProcessPool as error:
        raise TrainingError(
            f"a tokenizer process died ({error}), often because memory ran out. "
            "Run the same command again with a smaller num_workers: it resumes where it stopped."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(
    chunks: Iterable[CorpusChunk], options: TokenizeOptions, num_skipped: int, *, whole_chunks: bool
) -> Iterator[_Task]:
    number = 0
    for chunk in chunks:
        parts: Iterable[CorpusChunk] = [chunk] if whole_chunks else chunk.parts()
        num_emitted = 0
        for index, (part, is_last) in enumerate(_with_last(parts)):
            if whole_chunks or index >= num_skipped:
                skipped = num_skipped if whole_chunks else 0
                yield _Task(part, skipped, is_last, f"{options.spill_prefix}{number}")
                num_emitted, number = num_emitted + 1, number + 1
        if not num_emitted:
            yield _Task(_EMPTY_CHUNK, 0, ends_chunk=True, spill_path="")
        num_skipped = 0


def _run_task(task: _Task, options: TokenizeOptions) -> list[TokenizedPiece | SpilledPiece]:
    """The pieces of a task; those that are too large for memory in a file, which `_results` reads."""
    pieces: list[TokenizedPiece | SpilledPiece] = []
    num_bytes = 0
    with SpillFile(task.spill_path) as spill:
        for piece in tokenize_chunk(task.chunk, options, task.num_skipped):
            num_bytes += piece.num_result_bytes
            pieces.append(piece if num_bytes <= _RESULT_BYTES else spill.write(piece))
    return pieces


def _results(task: _Task, future: Future[list[TokenizedPiece | SpilledPiece]]) -> Iterator[TokenizedPiece]:
    pieces = future.result()
    loaded = (piece.load() if isinstance(piece, SpilledPiece) else piece for piece in pieces)
    yield from _with_end(loaded, ends_chunk=task.ends_chunk)
    if any(isinstance(piece, SpilledPiece) for piece in pieces):
        os.unlink(task.spill_path)  # noqa: PTH108 - its name is of this work: see `spill_prefix`


def _with_end(pieces: Iterable[TokenizedPiece], *, ends_chunk: bool) -> Iterator[TokenizedPiece]:
    for piece, is_last in _with_last(pieces):
        yield replace(piece, ends_chunk=True) if is_last and ends_chunk else piece


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield (item, whether it is the last)."""
    previous: list[T] = []
    for item in items:
        if previous:
            yield previous.pop(), False
        previous.append(item)
    if previous:
        yield previous.pop(), True


def _tokenize_part(part: CorpusChunk, options: TokenizeOptions) -> Iterator[TokenizedPiece]:
    tokenizer = _load_tokenizer(options.tokenizer_path, options.tokenizer_fingerprint)
    train, validation = _SplitEncoder(tokenizer, options), _SplitEncoder(tokenizer, options)
    skipped: Counter[str] = Counter()
    for document in part.documents(skipped):
        is_held_out = options.holdout > 0 and document.sampling_hash(_HOLDOUT_SALT) < options.holdout
        try:
            (validation if is_held_out else train).add(document)
        except DataError as error:
            raise DataError(f"{document.origin}: {error}") from error
        if train.num_tokens + validation.num_tokens >= _PIECE_TOKENS:
            yield TokenizedPiece(0, train.take(), validation.take(), ends_part=False)
    yield TokenizedPiece(
        part.source_bytes, train.take(), validation.take(), ends_part=True, skipped=dict(skipped)
    )


class _SplitEncoder:
    """Encodes the documents of one split and concatenates their tokens."""

    def __init__(self, tokenizer: Tokenizer, options: TokenizeOptions) -> None:
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._bos = self._id_array(options.bos_id)
        self._eos = self._id_array(options.eos_id)
        self._clear()

    def add(self, document: Document) -> None:
        ids = self._tokenizer.encode_array(document.text)
        if not (len(ids) or document.continues_previous or document.continues_in_next):
            return  # some imported tokenizers drop white space
        if not document.continues_previous:
            self._document_starts.append(self.num_tokens)
            self._append(self._bos)
        self._append(ids)
        if not document.continues_in_next:
            self._append(self._eos)
        self._num_bytes += document.num_bytes

    def take(self) -> EncodedDocuments:
        """What was added since the last call."""
        # One pass joins the int32 arrays and narrows them; every id is below the vocabulary's size.
        arrays = self._arrays or [np.empty(0, self._dtype)]
        ids = np.concatenate(arrays, dtype=self._dtype, casting="unsafe")
        taken = EncodedDocuments(ids, np.array(self._document_starts, dtype=np.int64), self._num_bytes)
        self._clear()
        return taken

    def _clear(self) -> None:
        self._arrays: list[NDArray[Any]] = []
        self._document_starts: list[int] = []
        self.num_tokens = 0
        self._num_bytes = 0

    def _append(self, ids: NDArray[Any]) -> None:
        if len(ids):
            self._arrays.append(ids)
            self.num_tokens += len(ids)

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
