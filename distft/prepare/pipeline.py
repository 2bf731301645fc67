"""Tokenizes a corpus into committed shards: parallel, resumable, same bytes for any number of workers."""

import os
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from pydantic import Field

from distft.config import PathText, Settings
from distft.data.corpus import (
    CHUNK_BYTES,
    CorpusConfig,
    ListedCorpus,
)
from distft.data.shard_layout import ShardLayout
from distft.data.shard_writer import ShardWriter
from distft.data.shards import TokenShards
from distft.errors import ConfigError, DataError
from distft.prepare.output import TRAIN, VALIDATION, Output
from distft.prepare.spill import TokenizedPiece
from distft.prepare.work_log import WorkHeader, WorkLog, WorkProgress
from distft.prepare.worker import TokenizeOptions, tokenize_chunks
from distft.tokenizer import Tokenizer

_SYNC_INTERVAL_S = 10.0  # at most so much work is lost in a power failure


class EmptySplitError(DataError):
    """The corpus has no document for the training or the validation split."""


class TokenizeConfig(Settings):
    """The corpus to tokenize, and the layout of the shards."""

    corpus: CorpusConfig
    tokenizer: PathText  # a .model or tokenizer.json file, or a directory with one
    output: PathText  # a directory or URL; shards go to its `train` and `validation`
    shard_tokens: int = Field(1 << 27, ge=1)  # per shard, except the last: 256 MiB of uint16
    num_workers: int | None = Field(None, ge=1)  # processes; None: one per core
    append_eos: bool | None = None  # after each document; None: if the tokenizer has one
    prepend_bos: bool = False  # before each document
    holdout: float = Field(0.0, ge=0, lt=1)  # fraction of documents for validation, by hash of their text
    # Local directory for shards until they are complete, if the output is a URL; None: for temporary files.
    staging: PathText | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeProgress:
    """Totals so far, including the work before an interruption."""

    num_bytes: int  # of UTF-8 text
    num_tokens: int
    num_documents: int
    source_bytes: int  # read from disk
    total_source_bytes: int


@dataclass(frozen=True, slots=True)
class TokenizeResult:
    train: TokenShards
    validation: TokenShards | None  # None without a holdout
    skipped: dict[str, int]  # rows that are no documents, by reason: "null" or "empty"


def tokenize(
    config: TokenizeConfig,
    *,
    corpus: ListedCorpus | None = None,
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[TokenizeProgress], None] | None = None,
    overwrite: bool = False,
) -> TokenizeResult:
    """Write token shards and a copy of the tokenizer to `config.output`.

    Interrupted work with the same settings is resumed; committed work is opened and returned. Raises
    `ConfigError` if the directory contains other work. With `overwrite` unfinished work is removed and
    started again, and committed shards are replaced when the new ones are complete. Raises `StorageError` if
    another process writes the output, and `DataError` if something cannot be read or written; the progress
    up to there is kept. `corpus` is `config.corpus` if the caller has listed its files. `on_start` gets the
    bytes on disk to read when the work begins; it is not called if all is committed already.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    options = _tokenize_options(config, tokenizer)
    output = Output(config.output, config.staging)
    corpus = corpus or ListedCorpus(config.corpus)
    output_spec = _output_spec(config, corpus, options)
    splits = [TRAIN, VALIDATION] if config.holdout else [TRAIN]
    committed = output.manifests()
    output.check_inputs(corpus.files, committed)
    if committed and not overwrite and not output.has_unfinished_work():
        return _open_committed(output, splits, output_spec)
    output.check_tokenizer(tokenizer, committed.values())
    with output.open_log() as log:
        saved, older = _find_work(output, log, output_spec, overwrite=overwrite)
        committed = output.manifests()  # another process may just have finished
        if saved is None and committed and not overwrite:
            return _open_committed(output, splits, output_spec)
        header = saved[0] if saved else output.begin(log, output_spec, older=older, take_over=overwrite)
        if saved:
            output.check_inputs(corpus.files, committed, header.work)
        work = _Work(config, corpus, options, output, header, log, tokenizer)
        if on_start:
            on_start(corpus.source_bytes)
        try:
            work.write(saved[1] if saved else [], on_progress)
        except EmptySplitError:
            output.remove_work(header)  # resuming would fail the same way
            log.remove()
            raise
    return _open_committed(output, splits, output_spec)


def _find_work(
    output: Output, log: WorkLog, output_spec: dict[str, Any], *, overwrite: bool
) -> tuple[tuple[WorkHeader, list[WorkProgress]] | None, WorkHeader | None]:
    """The work to resume, and work that `overwrite` has removed; None if there is none."""
    saved = log.load()
    if saved is None:
        return None, None
    header, _ = saved
    if overwrite:
        output.remove_work(header)
        return None, header
    if header.identity != output_spec:
        raise ConfigError(
            f"output={output.path} has unfinished shards of another corpus, tokenizer or setting. "
            "Finish them with their own settings, choose another output, or remove them with --overwrite."
        )
    output.renew_claim(header)
    return saved, None


@dataclass(frozen=True, slots=True)
class _Work:
    """The writing of one output, from its last progress to the commit."""

    config: TokenizeConfig
    corpus: ListedCorpus
    options: TokenizeOptions
    output: Output
    header: WorkHeader
    log: WorkLog
    tokenizer: Tokenizer

    @property
    def splits(self) -> list[str]:
        return [TRAIN, VALIDATION] if self.config.holdout else [TRAIN]

    def write(
        self, saved: list[WorkProgress], on_progress: Callable[[TokenizeProgress], None] | None
    ) -> None:
        """Write and commit all shards, from the newest of the `saved` progresses that the files match."""
        progress, writers = self._open_writers(saved)
        num_bytes = self.corpus.source_bytes
        last_sync = time.monotonic()
        with ExitStack() as open_writers:
            for writer in writers.values():
                open_writers.callback(writer.abort)
            with closing(self._pieces(progress, num_bytes)) as pieces:
                for piece in pieces:
                    _append(piece, writers, progress)
                    if not piece.ends_part:
                        continue
                    is_due = time.monotonic() - last_sync >= _SYNC_INTERVAL_S
                    for split, writer in writers.items():
                        progress.writers[split] = writer.flush(sync=is_due)
                    self.log.record(progress, synced=is_due)
                    last_sync = time.monotonic() if is_due else last_sync
                    for writer in writers.values():
                        writer.remove_sent()
                    if on_progress:
                        on_progress(_totals(progress, num_bytes))
            self._commit(writers, progress)

    def _open_writers(self, saved: list[WorkProgress]) -> tuple[WorkProgress, dict[str, ShardWriter]]:
        for index, progress in enumerate(saved):
            try:
                return progress, self._writers(progress)
            except DataError:
                if index == len(saved) - 1:
                    raise
        return WorkProgress(), self._writers(WorkProgress())

    def _writers(self, progress: WorkProgress) -> dict[str, ShardWriter]:
        tokenizer = self.tokenizer
        layout = ShardLayout(
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            shard_tokens=self.config.shard_tokens,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )
        output = self.output
        with ExitStack() as opened:
            writers = {}
            for split in self.splits:
                writers[split] = ShardWriter(
                    output.working / split,
                    layout,
                    progress.writers.get(split),
                    work=self.header.work,
                    target=output.split(split) if output.is_remote else None,
                    replace=True,  # the shards that the header names
                )
                opened.callback(writers[split].abort)
            opened.pop_all()
        return writers

    def _pieces(self, progress: WorkProgress, num_bytes: int) -> Generator[TokenizedPiece]:
        num_workers = self.config.num_workers or _default_num_workers(num_bytes)
        return tokenize_chunks(
            islice(self.corpus.chunks(), progress.num_chunks, None),
            replace(self.options, spill_prefix=str(self.output.working / f"spill-{self.header.work}-")),
            num_workers,
            num_skipped=progress.num_parts,
            # With fewer, some workers would have nothing to do.
            whole_chunks=self.corpus.num_files_with_one_reader >= num_workers,
        )

    def _commit(self, writers: dict[str, ShardWriter], progress: WorkProgress) -> None:
        now = ListedCorpus(self.config.corpus)  # listed anew
        if now.fingerprint != self.header.identity["corpus"]:
            raise DataError(
                "the files of the corpus changed while they were tokenized: some were added, removed or "
                "written. Leave them as they are, and start again with --overwrite."
            )
        for split, writer in writers.items():
            if writer.progress.num_tokens == 0:
                raise EmptySplitError(_empty_split_message(split, self.config))
        self.output.require_claim(self.header)
        self.output.save_tokenizer(self.tokenizer)
        for split in reversed(self.splits):
            skipped = {"skipped": dict(progress.skipped)} if progress.skipped else {}
            writers[split].commit({"identity": self.header.identity, **skipped})
        self.output.remove_replaced(self.header, self.splits)
        self.output.remove_work(self.header, is_complete=True)
        self.log.remove()


def _append(piece: TokenizedPiece, writers: dict[str, ShardWriter], progress: WorkProgress) -> None:
    for split, writer in writers.items():
        encoded = piece.train if split == TRAIN else piece.validation
        writer.append(encoded.ids, encoded.document_starts, encoded.num_bytes)
    progress.source_bytes += piece.source_bytes
    progress.skipped.update(piece.skipped)
    if piece.ends_chunk:
        progress.num_chunks, progress.num_parts = progress.num_chunks + 1, 0
    elif piece.ends_part:
        progress.num_parts += 1


def _default_num_workers(num_bytes: int) -> int:
    """One per core; fewer if starting them would take longer than tokenizing `num_bytes`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, num_bytes // (2 * CHUNK_BYTES)))


def _tokenize_options(config: TokenizeConfig, tokenizer: Tokenizer) -> TokenizeOptions:
    problems = []
    if config.append_eos and tokenizer.eos_id is None:
        problems.append(
            "append_eos=true, but the tokenizer has no eos: leave append_eos out, or train one with eos."
        )
    if config.prepend_bos and tokenizer.bos_id is None:
        problems.append(
            "prepend_bos=true, but the tokenizer has no bos: leave it out, or train one with bos."
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return TokenizeOptions(
        tokenizer_path=config.tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id if config.prepend_bos else None,
        eos_id=None if config.append_eos is False else tokenizer.eos_id,
        holdout=config.holdout,
    )


def _output_spec(config: TokenizeConfig, corpus: ListedCorpus, options: TokenizeOptions) -> dict[str, Any]:
    """Everything that determines the bytes of the shards: not the paths, nor the number of workers."""
    return {
        "corpus": corpus.fingerprint,
        "tokenizer": options.tokenizer_fingerprint,
        "shard_tokens": config.shard_tokens,
        "bos_id": options.bos_id,
        "eos_id": options.eos_id,
        "holdout": options.holdout,
    }


def _open_committed(output: Output, splits: list[str], output_spec: dict[str, Any]) -> TokenizeResult:
    committed = output.manifests()
    opened = [TokenShards(output.split(split), manifest) for split, manifest in committed.items()]
    if list(committed) != splits or any(shards.extra.get("identity") != output_spec for shards in opened):
        raise ConfigError(
            f"output={output.path} has token shards of another corpus, tokenizer or setting. "
            "Choose another output, or replace them with --overwrite."
        )
    found = opened[0].extra.get("skipped")
    counts = found.items() if isinstance(found, dict) else ()
    skipped = {str(name): number for name, number in counts if isinstance(number, int)}
    return TokenizeResult(opened[0], opened[1] if len(opened) > 1 else None, skipped)


def _totals(progress: WorkProgress, total_source_bytes: int) -> TokenizeProgress:
    writers = progress.writers.values()
    return TokenizeProgress(
        num_bytes=sum(writer.num_bytes for writer in writers),
        num_tokens=sum(writer.num_tokens for writer in writers),
        num_documents=sum(writer.num_documents for writer in writers),
        source_bytes=progress.source_bytes,
        total_source_bytes=total_source_bytes,
    )


def _empty_split_message(split: str, config: TokenizeConfig) -> str:
    if split == VALIDATION or config.holdout:
        return (
            f"holdout={config.holdout} left no document for {split}: the corpus has too few documents. "
            "Change --holdout, or split the text into more documents: --documents line or blank_line."
        )
    return "the corpus has no text: every document is empty."
