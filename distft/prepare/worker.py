"""What one process does to one part of a corpus, and the pool of such processes."""

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

from distft.data.corpus_parts import CorpusPart
from distft.data.shards import token_dtype
from distft.errors import DataError, TrainingError
from distft.tokenizer import Tokenizer

_HOLDOUT_SALT = "holdout"


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRecipe:
    """How documents become tokens."""

    tokenizer_path: str
    tokenizer_fingerprint: str
    bos_id: int | None  # put before each document; None: nothing
    eos_id: int | None  # put behind each document; None: nothing
    holdout: float  # share of documents for validation


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of some documents, end to end."""

    ids: NDArray[Any]
    document_starts: NDArray[np.int64]  # positions in `ids` where a document begins
    num_bytes: int  # of their UTF-8 text


@dataclass(frozen=True, slots=True)
class PartTokens:
    """One part of a corpus, tokenized."""

    source_bytes: int
    train: Tokens
    validation: Tokens


def tokenize_part(part: CorpusPart, recipe: PartRecipe) -> PartTokens:
    """Read `part` and encode its documents. Raises `DataError` with the place of what cannot be read."""
    tokenizer = _tokenizer(recipe.tokenizer_path, recipe.tokenizer_fingerprint)
    sides = (_Collector(tokenizer, recipe), _Collector(tokenizer, recipe))
    for document in part.documents():
        is_held_out = recipe.holdout > 0 and document.draw(_HOLDOUT_SALT) < recipe.holdout
        try:
            sides[is_held_out].add(
                document.text, document.num_bytes, document.continues, document.is_continued
            )
        except DataError as error:
            raise DataError(f"{document.origin}: {error}") from error
    return PartTokens(part.source_bytes, sides[0].collected(), sides[1].collected())


def tokenize_parts(
    parts: Iterable[CorpusPart], recipe: PartRecipe, num_workers: int
) -> Generator[PartTokens]:
    """`tokenize_part` of each part, in their order, by `num_workers` processes (1: in this one).

    Holds the tokens of at most `2 * num_workers + 2` parts.
    """
    if num_workers == 1:
        for part in parts:
            yield tokenize_part(part, recipe)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start_worker)
    waiting: deque[Future[PartTokens]] = deque()
    try:
        for part in parts:
            waiting.append(pool.submit(tokenize_part, part, recipe))
            if len(waiting) > 2 * num_workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise TrainingError(
            f"a tokenizing process ended by itself ({error}): often it was killed because memory ran out. "
            "Run the same command again, with a smaller num_workers; it goes on where it stopped."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


class _Collector:
    """Gathers the tokens of one side."""

    def __init__(self, tokenizer: Tokenizer, recipe: PartRecipe) -> None:
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._bos = _one_id(recipe.bos_id, self._dtype)
        self._eos = _one_id(recipe.eos_id, self._dtype)
        self._pieces: list[NDArray[Any]] = []
        self._starts: list[int] = []
        self._num_tokens = 0
        self._num_bytes = 0

    def add(self, text: str, num_bytes: int, continues: bool, is_continued: bool) -> None:
        ids = self._tokenizer.encode_array(text).astype(self._dtype)
        if not (len(ids) or continues or is_continued):
            return  # text that the tokenizer drops, such as white space in some imported ones
        if not continues:
            self._starts.append(self._num_tokens)
        pieces = [() if continues else self._bos, ids, () if is_continued else self._eos]
        for piece in pieces:
            if len(piece):
                self._pieces.append(np.asarray(piece))
                self._num_tokens += len(piece)
        self._num_bytes += num_bytes

    def collected(self) -> Tokens:
        ids = np.concatenate(self._pieces) if self._pieces else np.empty(0, self._dtype)
        return Tokens(ids, np.array(self._starts, dtype=np.int64), self._num_bytes)


def _one_id(value: int | None, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.array([] if value is None else [value], dtype=dtype)


@lru_cache(maxsize=1)
def _tokenizer(path: str, fingerprint: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{path} was replaced by another tokenizer while it was in use: start again.")
    return tokenizer


def _start_worker() -> None:
    # Ctrl-C reaches the whole terminal; the parent alone decides, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker of a killed parent would wait for work for ever: it holds both ends of the queue's pipe.
    parent = multiprocessing.parent_process()
    if parent:
        wait([parent.sentinel])
        os._exit(1)
