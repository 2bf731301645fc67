"""A corpus to committed token shards: on all cores, resumable, the same bytes for any number of workers."""

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
from distft.data.corpus import PART_BYTES, CorpusConfig, corpus_fingerprint, source_bytes
from distft.data.shard_writer import ShardWriter
from distft.data.shards import MANIFEST, ShardLayout, TokenShards
from distft.errors import ConfigError, DataError
from distft.prepare.record import Record, load_record, save_record
from distft.prepare.worker import PartRecipe, PartTokens, tokenize_parts
from distft.tokenizer import Tokenizer

TRAIN, VALIDATION = "train", "validation"
TOKENIZER = "tokenizer.model"


class EmptySideError(DataError):
    """The corpus gives training or validation no document at all."""


class TokenizeConfig(Settings):
    """What is tokenized, and how it is laid on disk."""

    corpus: CorpusConfig
    tokenizer: str  # a .model file
    output: str  # a local directory; shards go to its `train` and `validation`
    shard_tokens: int = Field(1 << 27, ge=1)  # of each shard but the last: 256 MiB of uint16
    num_workers: int | None = Field(None, ge=1)  # processes; None: one for each core
    append_eos: bool | None = None  # behind each document; None: if the tokenizer has one
    prepend_bos: bool = False  # before each document
    holdout: float = Field(0.0, ge=0, lt=1)  # share of documents for validation; a fixed draw by their text

    @model_validator(mode="after")
    def _output_is_local(self) -> Self:
        if "://" in self.output:
            raise ValueError(f"output={self.output} must be a local directory: shards are memory-mapped")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizeProgress:
    """How far it has come, with what an interrupted run had done before."""

    num_bytes: int  # of UTF-8 text
    num_tokens: int
    num_documents: int
    source_bytes: int  # read from disk, of
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
    """Write token shards to `config.output`, or go on where an interrupted run of the same work stopped.

    A copy of the tokenizer goes beside the shards. Work that is already committed is opened and returned.
    Raises `ConfigError` where the directory holds other work (`overwrite` removes it first), `DataError` for
    what cannot be read or written; what was recorded before stays good.
    """
    tokenizer = Tokenizer.load(config.tokenizer)
    output = Path(config.output)
    recipe = _recipe(config, tokenizer)
    identity = _identity(config, recipe, tokenizer)
    sides = [TRAIN, VALIDATION] if config.holdout else [TRAIN]
    if overwrite:
        _remove(output)
    record = load_record(output)
    if record is None and any((output / side / MANIFEST).exists() for side in (TRAIN, VALIDATION)):
        return _open_committed(output, sides, identity)
    record = record or Record(identity=identity)
    if record.identity != identity:
        raise ConfigError(
            f"output={output} holds unfinished shards of other work: another corpus, tokenizer or setting. "
            "Finish that with its own settings, choose another output, or remove it with --overwrite."
        )
    layout = ShardLayout(
        vocab_size=tokenizer.vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
        shard_tokens=config.shard_tokens,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
    )
    tokenizer.save(recipe.tokenizer_path)
    try:
        _write(config, recipe, layout, record, on_progress)
    except EmptySideError:
        _remove(output)  # going on would come to the same, and other settings would find it in their way
        raise
    return _open_committed(output, sides, identity)


def _write(
    config: TokenizeConfig,
    recipe: PartRecipe,
    layout: ShardLayout,
    record: Record,
    on_progress: Callable[[TokenizeProgress], None] | None,
) -> None:
    output = Path(config.output)
    total = source_bytes(config.corpus)
    sides = [TRAIN, VALIDATION] if config.holdout else [TRAIN]
    for side in sides:
        # Only an interruption between the two commits leaves one of them: it is made again, the same.
        (output / side / MANIFEST).unlink(missing_ok=True)
    writers = {side: ShardWriter(output / side, layout, record.writers.get(side)) for side in sides}
    try:
        with closing(_tokens(config, recipe, record.num_parts)) as results:
            for result in results:
                for side, writer in writers.items():
                    tokens = result.train if side == TRAIN else result.validation
                    writer.append(tokens.ids, tokens.document_starts, tokens.num_bytes)
                    record.writers[side] = writer.flush()
                record.num_parts += 1
                record.source_bytes += result.source_bytes
                save_record(output, record)
                if on_progress:
                    on_progress(_progress(record, total))
        for side, writer in writers.items():
            if writer.state.num_tokens == 0:
                raise EmptySideError(_nothing_for(side, config))
        for side in reversed(sides):
            writers[side].commit({"identity": record.identity})
    finally:
        for writer in writers.values():
            writer.abandon()
    save_record(output, None)


def _tokens(config: TokenizeConfig, recipe: PartRecipe, done: int) -> Generator[PartTokens]:
    num_workers = config.num_workers or _num_workers_for(source_bytes(config.corpus))
    return tokenize_parts(islice(config.corpus.parts(), done, None), recipe, num_workers)


def _num_workers_for(num_bytes: int) -> int:
    """One for each core; fewer for so little text that starting them would take longer than the work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, num_bytes // (2 * PART_BYTES)))


def _recipe(config: TokenizeConfig, tokenizer: Tokenizer) -> PartRecipe:
    faults = []
    if config.append_eos and tokenizer.eos_id is None:
        faults.append(
            "append_eos=true, but the tokenizer has no eos: leave append_eos out, or train one with eos."
        )
    if config.prepend_bos and tokenizer.bos_id is None:
        faults.append("prepend_bos=true, but the tokenizer has no bos: leave it out, or train one with bos.")
    if faults:
        raise ConfigError("\n".join(faults))
    return PartRecipe(
        tokenizer_path=str(Path(config.output) / TOKENIZER),
        tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id if config.prepend_bos else None,
        eos_id=None if config.append_eos is False else tokenizer.eos_id,
        holdout=config.holdout,
    )


def _identity(config: TokenizeConfig, recipe: PartRecipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the bytes written: not paths of output and tokenizer, nor the number of workers."""
    return {
        "corpus": corpus_fingerprint(config.corpus),
        "tokenizer": tokenizer.fingerprint,
        "shard_tokens": config.shard_tokens,
        "bos_id": recipe.bos_id,
        "eos_id": recipe.eos_id,
        "holdout": recipe.holdout,
    }


def _open_committed(output: Path, sides: list[str], identity: dict[str, Any]) -> TokenizeResult:
    committed = [side for side in (TRAIN, VALIDATION) if (output / side / MANIFEST).exists()]
    opened = [TokenShards.open(output / side) for side in committed]
    if committed != sides or any(shards.extra.get("identity") != identity for shards in opened):
        raise ConfigError(
            f"output={output} holds token shards of other work: another corpus, tokenizer or setting. "
            "Choose another output, or remove it with --overwrite."
        )
    return TokenizeResult(opened[0], opened[1] if len(opened) > 1 else None)


def _progress(record: Record, total: int) -> TokenizeProgress:
    states = record.writers.values()
    return TokenizeProgress(
        num_bytes=sum(state.num_bytes for state in states),
        num_tokens=sum(state.num_tokens for state in states),
        num_documents=sum(state.num_documents for state in states),
        source_bytes=record.source_bytes,
        total_source_bytes=total,
    )


def _nothing_for(side: str, config: TokenizeConfig) -> str:
    if side == VALIDATION or config.holdout:
        return (
            f"holdout={config.holdout} left no document for {side}: the corpus has too few documents. "
            "Change --holdout, or cut the text into more documents: --documents line or blank_line."
        )
    return "the corpus has no text: every document is empty."


def _remove(output: Path) -> None:
    """Take away what an earlier run wrote; the manifests first, so that no half of it counts."""
    for side in (TRAIN, VALIDATION):
        (output / side / MANIFEST).unlink(missing_ok=True)
    save_record(output, None)
    for side in (TRAIN, VALIDATION):
        if (output / side).exists():
            shutil.rmtree(output / side)
