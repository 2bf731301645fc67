"""Another layout of the same state on disk: any source, written as a checkpoint of ours for N ranks.

A resume needs none of this, since loading reshards. It serves where a checkpoint is to be one file, or many,
or ours at all.
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
from distft.checkpoint.comparison import check_whole
from distft.checkpoint.fragments import STATES, fingerprint
from distft.checkpoint.manifest import MANIFEST, FileRecord, Manifest, ParameterRecord, StateRecord
from distft.checkpoint.rank_file import Entry, write_rank_file
from distft.checkpoint.sources import CheckpointSource
from distft.checkpoint.target import new_directory
from distft.storage import checksum_of_bytes

_PIECE_NUMEL = 1 << 19  # elements in memory at a time, of each file that is being written
_SAMPLE_NUMEL = 1 << 22
_THREADS = min(4, os.cpu_count() or 1)

Intervals = Mapping[str, tuple[int, int]]
Progress = Callable[[int], None]


def contiguous_layout(numels: Mapping[str, int], world_size: int) -> list[Intervals]:
    """The [start, stop) of each parameter that each rank holds, if all of them end to end are cut evenly.

    Every element falls to exactly one rank, ranks differ by one element at most, and a rank that holds none
    of a parameter does not name it.
    """
    total = sum(numels.values())
    layout: list[dict[str, tuple[int, int]]] = [{} for _ in range(world_size)]
    position, rank = 0, 0  # of the next element, among all of them
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
class Plan:
    """What a reshard reads and writes."""

    layout: list[Intervals]
    num_bytes: list[int]  # of state in each file
    num_source_bytes: int


def plan_reshard(source: CheckpointSource, world_size: int) -> Plan:
    """Where everything goes; reads no state."""
    parameters = source.manifest.parameters
    layout = contiguous_layout({name: prod(p.shape) for name, p in parameters.items()}, world_size)
    num_bytes = [
        sum((stop - start) * _element_bytes(parameters[name]) for name, (start, stop) in held.items())
        for held in layout
    ]
    return Plan(layout, num_bytes, sum(num_bytes))


def estimate_seconds(source: CheckpointSource, plan: Plan) -> float:
    """About how long the reshard takes, from reading and checking up to 64 MiB of the source."""
    began, num_read = time.perf_counter(), 0
    for name, record in source.manifest.parameters.items():
        numel = min(prod(record.shape), _SAMPLE_NUMEL)
        for state in record.states:
            values = source.read(name, state, 0, numel)
            fingerprint(values, 0)
            checksum_of_bytes(memoryview(values.view(torch.uint8).numpy()))  # type: ignore[arg-type]
            num_read += values.numel() * values.element_size()
        if num_read > 4 * _SAMPLE_NUMEL:
            break
    # Writing costs about as much as the rest, and the files are shared out among threads.
    passes = 2 / min(_THREADS, len(plan.layout))
    return passes * (time.perf_counter() - began) / max(num_read, 1) * plan.num_source_bytes


def _element_bytes(parameter: ParameterRecord) -> int:
    return sum(getattr(torch, state.dtype).itemsize for state in parameter.states.values())


class _Prints:
    """Fingerprints of all states, from pieces that threads come by."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._totals: dict[tuple[str, str], int] = {}

    def add(self, name: str, state: str, values: Tensor, start: int) -> None:
        part = fingerprint(values, start)
        with self._lock:
            self._totals[name, state] = (self._totals.get((name, state), 0) + part) % (1 << 64)

    def text(self, name: str, state: str) -> str:
        return f"{self._totals.get((name, state), 0):016x}"


def write_distft(
    source: CheckpointSource, target: str, *, world_size: int = 1, on_progress: Progress | None = None
) -> Manifest:
    """Write `source` as a self-contained checkpoint of `world_size` files; `manifest.json` comes last.

    The source is checked first, every byte; then it is read once more, a few MiB at a time. Fingerprints are
    taken over where the source has them, and made where it has none. As with `cp`, the disk may still be at
    it when this returns. Raises `CheckpointError` for a damaged source, before anything is written, and
    `ConfigError` where `target` is taken.
    """
    plan = plan_reshard(source, world_size)
    prints = _Prints()
    check_whole(source)
    with new_directory(target, source.path):

        def write(rank: int) -> FileRecord:
            entries = list(_entries(source, plan.layout[rank], prints, on_progress))
            name = f"rank_{rank:05d}.safetensors"
            writer = write_rank_file(storage.join(target, name), entries, durable=False)
            intervals = {entry.parameter: (entry.start, entry.stop) for entry in entries}
            return FileRecord(
                name=name, num_bytes=writer.num_bytes, checksum=writer.checksum, intervals=intervals
            )

        with ThreadPoolExecutor(_THREADS) as threads:
            files = list(threads.map(write, range(world_size)))
        manifest = _manifest(source, files, prints)
        _copy_attachments(source, target)
        storage.commit_bytes(storage.join(target, MANIFEST), manifest.to_bytes())
    return manifest


def _entries(
    source: CheckpointSource, held: Intervals, prints: _Prints, on_progress: Progress | None
) -> Iterator[Entry]:
    for name, (start, stop) in held.items():
        states = source.manifest.parameters[name].states
        for state in STATES:
            if state not in states:
                continue
            dtype = getattr(torch, states[state].dtype)
            is_print_known = states[state].fingerprint is not None

            def pieces(
                name: str = name,
                state: str = state,
                start: int = start,
                stop: int = stop,
                is_print_known: bool = is_print_known,
            ) -> Iterator[Tensor]:
                for begin in range(start, stop, _PIECE_NUMEL):
                    values = source.read(name, state, begin, min(begin + _PIECE_NUMEL, stop))
                    if not is_print_known:
                        prints.add(name, state, values, begin)
                    yield values
                    if on_progress is not None:
                        on_progress(values.numel() * values.element_size())

            yield Entry(name, state, start, stop, dtype, pieces)


def _manifest(source: CheckpointSource, files: list[FileRecord], prints: _Prints) -> Manifest:
    parameters = {}
    for name, record in source.manifest.parameters.items():
        states = {
            state: saved
            if saved.fingerprint
            else StateRecord(dtype=saved.dtype, fingerprint=prints.text(name, state))
            for state, saved in record.states.items()
        }
        parameters[name] = record.model_copy(update={"states": states})
    return source.manifest.model_copy(update={"parameters": parameters, "files": files})


def _copy_attachments(source: CheckpointSource, target: str) -> None:
    tokenizer = source.manifest.tokenizer
    if tokenizer is not None and tokenizer.file is not None:
        storage.copy(storage.join(source.path, tokenizer.file), storage.join(target, tokenizer.file))
