"""Rewrite a checkpoint of any format as a distft checkpoint with N rank files.

A resume does not need it, because loading reshards. Use it to merge many files into one, to split one into
many, or to convert a foreign format.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from threading import Lock

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.damage import require_undamaged
from distft.checkpoint.fingerprint import fingerprint, fingerprint_text
from distft.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    ParameterRecord,
    StateRecord,
    TokenizerRecord,
)
from distft.checkpoint.rank_file import LazyFragment, bytes_of, write_rank_file
from distft.checkpoint.sources import CheckpointSource, stored_states
from distft.checkpoint.steps import rank_file_name
from distft.checkpoint.target import target_directory
from distft.storage import checksum_of_bytes
from distft.tokenizer import Tokenizer

_CHUNK_NUMEL = 1 << 19  # elements in memory at a time, for each file that is being written
_SAMPLE_NUMEL = 1 << 22
_THREADS = min(4, os.cpu_count() or 1)

Intervals = Mapping[str, tuple[int, int]]  # parameter -> elements [start, stop)
ProgressCallback = Callable[[int], None]


def contiguous_layout(numels: Mapping[str, int], world_size: int) -> list[Intervals]:
    """Cut all parameters, laid end to end, evenly among ranks; returns the intervals of each rank.

    Each element goes to exactly one rank, and ranks differ by at most one element. A rank without elements
    of a parameter does not list it.
    """
    total = sum(numels.values())
    layout: list[dict[str, tuple[int, int]]] = [{} for _ in range(world_size)]
    position, rank = 0, 0  # of the next element, counted over all parameters
    for name, numel in numels.items():
        begin, end = position, position + numel
        if not numel:
            layout[rank][name] = 0, 0
        while position < end:
            upper = total * (rank + 1) // world_size
            if upper > position:
                stop = min(end, upper)
                layout[rank][name] = position - begin, stop - begin
                position = stop
            else:
                rank += 1
    return list(layout)


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """Layout and sizes of the files that a reshard will write."""

    layout: list[Intervals]  # by rank
    num_bytes: list[int]  # of state in each file
    num_source_bytes: int


def plan_reshard(source: CheckpointSource, world_size: int) -> ReshardPlan:
    """Lay out `source` for `world_size` ranks; reads no state."""
    parameters = source.manifest.parameters
    layout = contiguous_layout({name: prod(p.shape) for name, p in parameters.items()}, world_size)
    num_bytes = [
        sum((stop - start) * _element_bytes(parameters[name]) for name, (start, stop) in intervals.items())
        for intervals in layout
    ]
    return ReshardPlan(layout, num_bytes, sum(num_bytes))


def estimate_seconds(source: CheckpointSource, plan: ReshardPlan) -> float:
    """Estimate how long the reshard takes, by reading and checking up to 64 MiB of the source."""
    began, num_read = time.perf_counter(), 0
    for name, record in source.manifest.parameters.items():
        numel = min(prod(record.shape), _SAMPLE_NUMEL)
        for state in record.states:
            values = source.read(name, state, 0, numel)
            fingerprint(values, 0)
            checksum_of_bytes(bytes_of(values))
            num_read += values.numel() * values.element_size()
        if num_read > 4 * _SAMPLE_NUMEL:
            break
    # Writing takes about as long as reading and checking; threads share the files.
    passes = 2 / min(_THREADS, len(plan.layout))
    return passes * (time.perf_counter() - began) / max(num_read, 1) * plan.num_source_bytes


def _element_bytes(parameter: ParameterRecord) -> int:
    return sum(getattr(torch, state.dtype).itemsize for state in parameter.states.values())


class _FingerprintSums:
    """Fingerprints of all states, summed from chunks that several threads add."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._totals: dict[tuple[str, str], int] = {}

    def add(self, name: str, state: str, values: Tensor, start: int) -> None:
        summand = fingerprint(values, start)
        with self._lock:
            self._totals[name, state] = self._totals.get((name, state), 0) + summand

    def text(self, name: str, state: str) -> str:
        return fingerprint_text(self._totals.get((name, state), 0))


def write_distft(
    source: CheckpointSource, target: str, *, world_size: int = 1, on_progress: ProgressCallback | None = None
) -> Manifest:
    """Write `source` as a self-contained checkpoint of `world_size` files; `manifest.json` is written last.

    Checks every byte of the source first, then reads it again, a few MiB at a time. Computes the
    fingerprints that the source lacks. As with `cp`, the disk may still be writing when this returns. Raises
    `CheckpointError` for a damaged source, before anything is written, and `ConfigError` if `target` is in
    use.
    """
    plan = plan_reshard(source, world_size)
    sums = _FingerprintSums()
    require_undamaged(source)
    with target_directory(target, source.path):

        def write(rank: int) -> FileRecord:
            name = rank_file_name(rank)
            fragments = list(_lazy_fragments(source, plan.layout[rank], sums, on_progress))
            return write_rank_file(storage.join(target, name), fragments, name=name, durable=False)

        with ThreadPoolExecutor(_THREADS) as threads:
            files = list(threads.map(write, range(world_size)))
        manifest = _manifest(source, files, sums, _copy_tokenizer(source, target))
        storage.commit_bytes(storage.join(target, MANIFEST), manifest.to_bytes())
    return manifest


def _lazy_fragments(
    source: CheckpointSource,
    intervals: Intervals,
    sums: _FingerprintSums,
    on_progress: ProgressCallback | None,
) -> Iterator[LazyFragment]:
    for name, (start, stop) in intervals.items():
        for state in stored_states(source, name):
            record = source.manifest.parameters[name].states[state]

            def chunks(
                name: str = name,
                state: str = state,
                start: int = start,
                stop: int = stop,
                needs_fingerprint: bool = record.fingerprint is None,
            ) -> Iterator[Tensor]:
                for begin in range(start, stop, _CHUNK_NUMEL):
                    values = source.read(name, state, begin, min(begin + _CHUNK_NUMEL, stop))
                    if needs_fingerprint:
                        sums.add(name, state, values, begin)
                    yield values
                    if on_progress is not None:
                        on_progress(values.numel() * values.element_size())

            yield LazyFragment(name, state, start, stop, getattr(torch, record.dtype), chunks)


def _manifest(
    source: CheckpointSource,
    files: list[FileRecord],
    sums: _FingerprintSums,
    tokenizer: TokenizerRecord | None,
) -> Manifest:
    parameters = {}
    for name, record in source.manifest.parameters.items():
        states = {
            state: saved
            if saved.fingerprint
            else StateRecord(dtype=saved.dtype, fingerprint=sums.text(name, state))
            for state, saved in record.states.items()
        }
        parameters[name] = record.model_copy(update={"states": states})
    changes = {"parameters": parameters, "files": files, "tokenizer": tokenizer, "base": None}
    return source.manifest.model_copy(update=changes)


def _copy_tokenizer(source: CheckpointSource, target: str) -> TokenizerRecord | None:
    """Write the source's tokenizer into `target`; returns its record there."""
    record = source.manifest.tokenizer
    if record is None or record.file is None:
        return record
    # Not a copy: what lies beside a sentencepiece model of transformers becomes part of the one file.
    tokenizer = Tokenizer.load(storage.join(source.path, record.file))
    for name, data in tokenizer.files().items():
        storage.commit_bytes(storage.join(target, name), data)
    return record.model_copy(update={"file": tokenizer.file_name})
