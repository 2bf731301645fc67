"""Committed distft checkpoints: find, read and verify them."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import torch

from distft import storage
from distft.checkpoint.fingerprint import fingerprint, fingerprint_text
from distft.checkpoint.fragments import WEIGHT, Interval, StoredIntervals
from distft.checkpoint.manifest import MANIFEST, Manifest
from distft.checkpoint.rank_file import FragmentLocation, read_header, read_values
from distft.checkpoint.sources import CheckpointSource, ManifestSource
from distft.checkpoint.steps import STEP_PREFIX, absolute, find_checkpoint_directory, step_name
from distft.collectives import Collectives, all_or_none
from distft.errors import CheckpointError, DataError, StorageError, UnreachableError
from distft.tokenizer import Tokenizer

SIBLING_PREFIX = "../"  # begins the name of a file in another directory of the same store
_CHUNK_NUMEL = 1 << 20  # elements of the base that are compared at a time
_THREADS = min(4, os.cpu_count() or 1)


class Checkpoint(ManifestSource):
    """A committed distft checkpoint: its manifest, and its state by name and interval."""

    format = "distft"

    def __init__(self, path: str, manifest: Manifest) -> None:
        super().__init__(path, manifest)
        self.notes: tuple[str, ...] = ()  # what the user should know
        self.base: CheckpointSource | None = None  # the one that `manifest.base` names, once it is opened
        self._in_base = set() if manifest.base is None else set(manifest.base.parameters)
        self._headers: dict[int, dict[tuple[str, str], FragmentLocation]] = {}  # by file number
        self._intervals: dict[str, StoredIntervals] = {}  # by parameter that was read; owners: file numbers
        self._last_owner = 0  # the file that the last read was from
        self._numels = {name: prod(record.shape) for name, record in manifest.parameters.items()}

    @classmethod
    def open(cls, path: str) -> "Checkpoint":
        """The checkpoint at `path`. Raises `CheckpointError` if none was committed there."""
        return cls(path, Manifest.from_bytes(read_manifest(path), storage.join(path, MANIFEST)))

    @property
    def step(self) -> int:
        return self.manifest.progress.step

    def file_path(self, number: int) -> str:
        """Path of a file of the manifest: in this directory, or in a sibling directory."""
        name = self.manifest.files[number].name
        if not name.startswith(SIBLING_PREFIX):
            return storage.join(self.path, name)
        below = name.removeprefix(SIBLING_PREFIX)
        beside = storage.join(storage.parent(absolute(self.path)), below)
        if storage.is_link(self.path) and not storage.exists(beside):
            # Such as ./latest -> run/checkpoints/step_00000500.
            return storage.join(os.path.realpath(self.path), "..", below)
        return beside

    def read(self, parameter: str, state: str, start: int, stop: int) -> torch.Tensor:
        if parameter in self._in_base:
            return self._read_base(parameter, state, start, stop)
        try:
            intervals = self.locate(parameter, start, stop)
        except ValueError as gap:
            raise CheckpointError(f"{self.path} lacks element {gap} of {state} of {parameter!r}.") from None
        if not intervals:  # no elements are asked for, as of a parameter that has none
            record = self.manifest.parameters[parameter].states[state]
            return torch.empty(0, dtype=getattr(torch, record.dtype))
        values = [self._read_interval(parameter, state, interval) for interval in intervals]
        return values[0] if len(values) == 1 else torch.cat(values)

    def _read_base(self, parameter: str, state: str, start: int, stop: int) -> torch.Tensor:
        """In the dtype that the run computed with, to which its engine rounded them too."""
        if self.base is None:
            raise CheckpointError(f"{self.path} does not hold {parameter!r}, and its base was not opened.")
        dtype: torch.dtype = getattr(torch, self.manifest.parameters[parameter].states[state].dtype)
        return self.base.read(parameter, state, start, stop).to(dtype)

    def _find_base_damage(self, names: Sequence[str]) -> list[str]:
        """A message if weights in the base are not those that the run began with."""
        if self.base is None or not names:
            return []
        changed = []
        for name in names:
            record = self.manifest.parameters[name]
            is_there = self.base.has(name, WEIGHT) and self.base.shape(name) == record.shape
            total = 0
            for start in range(0, self._numels[name] if is_there else 0, _CHUNK_NUMEL):
                stop = min(start + _CHUNK_NUMEL, self._numels[name])
                total += fingerprint(self._read_base(name, WEIGHT, start, stop), start)
            if not is_there or fingerprint_text(total) != record.states[WEIGHT].fingerprint:
                changed.append(name)
        if not changed:
            return []
        return [
            f"{self.path} holds adapters for another base than {self.base.path}: {len(changed)} of its "
            f"weights, such as {changed[0]}, are not those of the training."
        ]

    def locate(self, parameter: str, start: int, stop: int) -> list[Interval]:
        """The parts of [start, stop) in the files; owners are numbers of files.

        A rank that resumes finds nearly all of its state in one file, so that file is tried first: otherwise
        512 ranks take 0.4 s for a model of 70B. Raises `ValueError` with the first element that no file has.
        """
        if parameter not in self.manifest.parameters:
            raise ValueError(start)
        if self.manifest.files:
            first, last = self._interval(parameter, self._last_owner) or (0, -1)
            if first <= start < stop <= last:
                return [Interval(start, stop, self._last_owner)]
        if parameter not in self._intervals:
            stored = (
                (self._interval(parameter, number), number) for number in range(len(self.manifest.files))
            )
            self._intervals[parameter] = StoredIntervals(
                (*interval, number) for interval, number in stored if interval is not None
            )
        intervals = self._intervals[parameter].cover(start, stop)
        if intervals:
            self._last_owner = intervals[-1].owner
        return intervals

    def _interval(self, parameter: str, number: int) -> tuple[int, int] | None:
        """The elements of a parameter that a file says to have."""
        file = self.manifest.files[number]
        interval = file.intervals.get(parameter)
        if interval is not None and not interval[0] <= interval[1] <= self._numels[parameter]:
            raise CheckpointError(
                f"{self.path}: {file.name} cannot have elements {interval[0]} to {interval[1]} of "
                f"{parameter!r}, which has {self._numels[parameter]}; use another checkpoint."
            )
        return interval

    def _read_interval(self, parameter: str, state: str, interval: Interval) -> torch.Tensor:
        path = self.file_path(interval.owner)
        if interval.owner not in self._headers:
            self._headers[interval.owner] = read_header(path)
        location = self._headers[interval.owner].get((parameter, state))
        if location is None:
            raise CheckpointError(f"{path} lacks {state} of {parameter!r}, which its manifest lists.")
        return read_values(path, location, interval.start, interval.stop)

    def find_damage(self, file_numbers: Sequence[int] | None = None) -> list[str]:
        """A message for each of these files that is missing, or whose size or content is not as written.

        Without numbers, checks all files and the tokenizer. Raises `UnreachableError` if a file's condition
        cannot be determined.
        """
        numbers = range(len(self.manifest.files)) if file_numbers is None else file_numbers
        with ThreadPoolExecutor(_THREADS) as threads:  # reading and hashing release the interpreter lock
            found = [damage for damage in threads.map(self._find_file_damage, numbers) if damage]
        if file_numbers is not None:
            return found
        return [*found, *self._find_base_damage(sorted(self._in_base)), *self.find_tokenizer_damage()]

    def find_tokenizer_damage(self) -> list[str]:
        """A message if the tokenizer beside the manifest is missing, or encodes to other ids."""
        record = self.manifest.tokenizer
        if record is None or record.file is None:
            return []
        where = storage.join(self.path, record.file)
        try:
            with storage.unreadable_as_unreachable(where):
                storage.read_bytes(where)
            found = Tokenizer.load(where).fingerprint
        except FileNotFoundError:
            damage = f"{where} is missing"
        except DataError as error:
            damage = f"{where} is damaged ({error})"
        else:
            if found == record.fingerprint:
                return []
            damage = f"{where} is damaged: its fingerprint is {found}, the manifest's {record.fingerprint}"
        return [f"{damage}; another checkpoint of the run has it: copy it from there."]

    def _find_file_damage(self, number: int) -> str:
        record = self.manifest.files[number]
        try:
            storage.verify(self.file_path(number), checksum=record.checksum, num_bytes=record.num_bytes)
        except UnreachableError:
            raise
        except StorageError as error:
            hint = ""
            if record.name.startswith(SIBLING_PREFIX):
                hint = " To copy a checkpoint with frozen weights, use `distft checkpoint convert`."
            return f"{error}{hint}"
        return ""

    def verify(self, collectives: Collectives) -> None:
        """Check every byte; all ranks call this together and share the files.

        Raises `CheckpointError`, on all ranks, that names each damaged file.
        """
        with all_or_none(collectives, CheckpointError):
            own_numbers = range(collectives.rank, len(self.manifest.files), collectives.world_size)
            own_names = sorted(self._in_base)[collectives.rank :: collectives.world_size]
            found = [*self.find_damage(own_numbers), *self._find_base_damage(own_names)]
            if found:
                raise CheckpointError("\n".join(found))


def read_manifest(path: str) -> bytes:
    """The bytes of the manifest in the directory `path`. Raises `CheckpointError` if it has none."""
    where = storage.join(path, MANIFEST)
    try:
        with storage.unreadable_as_unreachable(where):
            return storage.read_bytes(where)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CheckpointError(
            f"{path} has no {MANIFEST}, so no checkpoint was committed there; "
            f"give a run's directory, or one of its checkpoints/{STEP_PREFIX}*."
        ) from None


def find_checkpoint(path: str, *, newest: bool = False) -> Checkpoint:
    """The checkpoint at `path`, or the newest commit of the run or `checkpoints` directory there.

    Of a run with early stopping its best commit, unless `newest`. Raises `CheckpointError` if there is none.
    """
    directory = find_checkpoint_directory(path)
    found = Checkpoint.open(directory)
    best = found.manifest.progress.best_of_run
    if newest or best is None or best.value is None or best.step == found.step or directory == path:
        return found
    best_directory = storage.join(storage.parent(directory), step_name(best.step))
    if storage.exists(storage.join(best_directory, MANIFEST)):
        return Checkpoint.open(best_directory)
    found.notes = (
        f"the run's best commit, of step {best.step} ({best.metric} {best.value:.6g}), is gone; the "
        f"newest is of step {found.step}.",
    )
    return found
