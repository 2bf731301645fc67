"""Tokenizes a corpus into committed shards: parallel, resumable, same bytes for any number of workers."""

import os
import shutil
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from distft.config import Settings
from distft.data.corpus import CHUNK_BYTES, CorpusConfig, corpus_fingerprint, source_bytes
from distft.data.shard_writer import ShardWriter
from distft.data.shards import MANIFEST, ShardLayout, TokenShards
from distft.errors import ConfigError, DataError
from distft.prepare.saved_progress import SavedProgress, load_progress, remove_progress, save_progress
from distft.prepare.worker import TokenizedChunk, TokenizeOptions, tokenize_chunks
from distft.tokenizer import Tokenizer

TRAIN, VALIDATION = "train", "validation"
TOKENIZER = "tokenizer.model"


class EmptySplitError(DataError):
    """The corpus has no document for the training or the validation split."""


class TokenizeConfig(Settings):
    """The corpus to tokenize, and the layout of the shards."""

    corpus: CorpusConfig
    tokenizer: str  # a .model file
    output: str  # a local directory; shards go to its `train` and `validation`
    shard_tokens: int = Field(1 << 27, ge=1)  # per shard, except the last: 256 MiB of uint16
    num_workers: int | None = Field(None, ge=1)  # processes; None: one per core
    append_eos: bool | None = None  # after each document; None: if the tokenizer has one
    prepend_bos: bool = False  # before each document
    holdout: float = Field(0.0, ge=0, lt=1)  # fraction of documents for validation, by hash of their text

    @model_validator(mode="after")
    def _check_output(self) -> Self:
        if "://" in self.output:
            raise ValueError(f"output={self.output} must be a local directory: shards are memory-mapped")
        return self


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


def tokenize(
    config: TokenizeConfig,
    *,
    on_progress: Callable[[TokenizeProgress], None] | None = None,
    overwrite: bool = False,
) -> TokenizeResult:
    """Write token shards and a copy of the tokenizer to `config.output`.

    Interrupted work with the same settings is resumed; committed work is opened and returned. Raises
    `ConfigError` if the directory contains other work (`overwrite` removes it first), and `DataError` if
    something cannot be read or written; the progress up to there is kept.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    output = Path(config.output)
    options = _tokenize_options(config, tokenizer)
    output_spec = _output_spec(config, options, tokenizer)
    splits = [TRAIN, VALIDATION] if config.holdout else [TRAIN]
    if overwrite:
        _remove(output)
    progress = load_progress(output)
    if progress is None and any((output / split / MANIFEST).exists() for split in (TRAIN, VALIDATION)):
        return _open_committed(output, splits, output_spec)
    progress = progress or SavedProgress(output_spec=output_spec)
    if progress.output_spec != output_spec:
        raise ConfigError(
            f"output={output} has unfinished shards of another corpus, tokenizer or setting. "
            "Finish them with their own settings, choose another output, or remove them with --overwrite."
        )
    layout = ShardLayout(
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        shard_tokens=config.shard_tokens,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    tokenizer.save(options.tokenizer_path)
    try:
        _write(config, options, layout, progress, on_progress)
    except EmptySplitError:
        _remove(output)  # resuming would fail the same way, and other settings would be refused
        raise
    return _open_committed(output, splits, output_spec)


def _write(
    config: TokenizeConfig,
    options: TokenizeOptions,
    layout: ShardLayout,
    progress: SavedProgress,
    on_progress: Callable[[TokenizeProgress], None] | None,
) -> None:
    output = Path(config.output)
    total_source_bytes = source_bytes(config.corpus)
    splits = [TRAIN, VALIDATION] if config.holdout else [TRAIN]
    for split in splits:
        # An interruption between the two commits leaves one manifest; it is rewritten, with the same bytes.
        (output / split / MANIFEST).unlink(missing_ok=True)
    writers = {split: ShardWriter(output / split, layout, progress.writers.get(split)) for split in splits}
    try:
        with closing(_tokenized_chunks(config, options, progress.num_chunks)) as chunks:
            for chunk in chunks:
                for split, writer in writers.items():
                    encoded = chunk.train if split == TRAIN else chunk.validation
                    writer.append(encoded.ids, encoded.document_starts, encoded.num_bytes)
                    progress.writers[split] = writer.flush()
                progress.num_chunks += 1
                progress.source_bytes += chunk.source_bytes
                save_progress(output, progress)
                if on_progress:
                    on_progress(_totals(progress, total_source_bytes))
        for split, writer in writers.items():
            if writer.progress.num_tokens == 0:
                raise EmptySplitError(_empty_split_message(split, config))
        for split in reversed(splits):
            writers[split].commit({"identity": progress.output_spec})
    finally:
        for writer in writers.values():
            writer.abort()
    remove_progress(output)


def _tokenized_chunks(
    config: TokenizeConfig, options: TokenizeOptions, num_done: int
) -> Generator[TokenizedChunk]:
    num_workers = config.num_workers or _default_num_workers(source_bytes(config.corpus))
    return tokenize_chunks(islice(config.corpus.chunks(), num_done, None), options, num_workers)


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
        tokenizer_path=str(Path(config.output) / TOKENIZER),
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id if config.prepend_bos else None,
        eos_id=None if config.append_eos is False else tokenizer.eos_id,
        holdout=config.holdout,
    )


def _output_spec(config: TokenizeConfig, options: TokenizeOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that determines the bytes of the shards: not the paths, nor the number of workers."""
    return {
        "corpus": corpus_fingerprint(config.corpus),
        "tokenizer": tokenizer.fingerprint,
        "shard_tokens": config.shard_tokens,
        "bos_id": options.bos_id,
        "eos_id": options.eos_id,
        "holdout": options.holdout,
    }


def _open_committed(output: Path, splits: list[str], output_spec: dict[str, Any]) -> TokenizeResult:
    committed = [split for split in (TRAIN, VALIDATION) if (output / split / MANIFEST).exists()]
    opened = [TokenShards.open(output / split) for split in committed]
    if committed != splits or any(shards.extra.get("identity") != output_spec for shards in opened):
        raise ConfigError(
            f"output={output} has token shards of another corpus, tokenizer or setting. "
            "Choose another output, or remove them with --overwrite."
        )
    return TokenizeResult(opened[0], opened[1] if len(opened) > 1 else None)


def _totals(progress: SavedProgress, total_source_bytes: int) -> TokenizeProgress:
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


def _remove(output: Path) -> None:
    """Remove an earlier output; the manifests first, so that a partial removal does not look committed."""
    for split in (TRAIN, VALIDATION):
        (output / split / MANIFEST).unlink(missing_ok=True)
    remove_progress(output)
    for split in (TRAIN, VALIDATION):
        if (output / split).exists():
            shutil.rmtree(output / split)
