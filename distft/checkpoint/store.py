"""Committed checkpoints under one directory: write, list, verify, retain."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field

from distft import storage
from distft.checkpoint.fragments import STATES, Fragment, Interval, cover, fingerprint
from distft.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    ParameterRecord,
    Progress,
    StateRecord,
    TokenizerRecord,
)
from distft.checkpoint.rank_file import Place, read_header, read_values, write_rank_file
from distft.collectives import Collectives, together
from distft.config import Settings
from distft.errors import CheckpointError, StorageError

_STEP = "step_"


class CheckpointConfig(Settings):
    """When a run saves, and what it keeps."""

    directory: str | None = None  # a path or a URL that all ranks reach; None: checkpoints/ in run_dir
    every_steps: int | None = Field(default=None, ge=1)  # besides the last step, which is always saved
    keep_last: int = Field(default=2, ge=1)
    keep_every_steps: int | None = Field(default=None, ge=1)  # steps that are kept for good
    resume: bool = True  # go on from the newest good commit in the run's directory, if there is one


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What a manifest says besides the state itself."""

    run_id: str
    config: dict[str, Any]
    label_names: list[str] | None
    tokenizer: TokenizerRecord | None
    written_by: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter of the model that is being saved."""

    shape: tuple[int, ...]
    trainable: bool
    updates: int


class Checkpoint:
    """A committed checkpoint of ours: its manifest, and its state by name and interval."""

    format = "distft"

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._headers: dict[int, dict[tuple[str, str], Place]] = {}
        self._held: dict[str, list[Interval]] = {}
        for number, record in enumerate(manifest.files):
            for parameter, (start, stop) in record.intervals.items():
                self._held.setdefault(parameter, []).append(Interval(start, stop, number))

    @classmethod
    def open(cls, path: str) -> "Checkpoint":
        """The checkpoint at `path`. Raises `CheckpointError` where none was committed."""
        where = storage.join(path, MANIFEST)
        try:
            data = storage.read_bytes(where)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} holds no {MANIFEST}, so no checkpoint was committed there; "
                f"give a run's directory, or one of its checkpoints/{_STEP}*."
            ) from None
        return cls(path, Manifest.from_bytes(data, where))

    @property
    def step(self) -> int:
        return self.manifest.progress.step

    def file_path(self, number: int) -> str:
        return storage.join(self.path, self.manifest.files[number].name)

    def has(self, parameter: str, state: str) -> bool:
        record = self.manifest.parameters.get(parameter)
        return record is not None and state in record.states

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        record = self.manifest.parameters.get(parameter)
        return None if record is None else record.shape

    def updates(self, parameter: str) -> int:
        record = self.manifest.parameters.get(parameter)
        return 0 if record is None else record.updates

    def read(self, parameter: str, state: str, start: int, stop: int) -> torch.Tensor:
        try:
            pieces = cover(start, stop, self._held.get(parameter, ()))
        except ValueError as gap:
            raise CheckpointError(f"{self.path} lacks element {gap} of {state} of {parameter!r}.") from None
        values = [self._read_piece(parameter, state, piece) for piece in pieces]
        return values[0] if len(values) == 1 else torch.cat(values)

    def _read_piece(self, parameter: str, state: str, piece: Interval) -> torch.Tensor:
        path = self.file_path(piece.holder)
        if piece.holder not in self._headers:
            self._headers[piece.holder] = read_header(path)
        place = self._headers[piece.holder].get((parameter, state))
        if place is None:
            raise CheckpointError(f"{path} has no {state} of {parameter!r}, which its manifest promises.")
        return read_values(path, place, piece.start, piece.stop)

    def faults(self, numbers: Sequence[int] | None = None) -> list[str]:
        """What is wrong with the files of these numbers, or all: absent, of another size or other bytes."""
        found = []
        for number in range(len(self.manifest.files)) if numbers is None else numbers:
            record = self.manifest.files[number]
            try:
                storage.verify(self.file_path(number), checksum=record.checksum, num_bytes=record.num_bytes)
            except StorageError as error:
                found.append(str(error))
        return found

    def verify(self, collectives: Collectives) -> None:
        """Check every byte, each file on one rank; fails on all ranks together, naming each damaged file."""
        with together(collectives, CheckpointError):
            mine = range(collectives.rank, len(self.manifest.files), collectives.world_size)
            found = self.faults(mine)
            if found:
                raise CheckpointError("\n".join(found))


class CheckpointStore:
    """The checkpoints of one run. Every method is called by all ranks together."""

    def __init__(self, root: str, collectives: Collectives) -> None:
        self.root = root
        self._collectives = collectives

    def path(self, step: int) -> str:
        return storage.join(self.root, f"{_STEP}{step:08d}")

    def newest_good(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest commit that is whole, and what was wrong with each newer one."""
        complaints: list[str] = []
        steps = self._collectives.broadcast(committed_steps(self.root) if self._collectives.rank == 0 else [])
        for step in reversed(steps):
            try:
                with together(self._collectives, CheckpointError):
                    checkpoint = Checkpoint.open(self.path(step))
                checkpoint.verify(self._collectives)
            except CheckpointError as error:
                complaints.append(f"step {step}: {error}")
                continue
            return checkpoint, complaints
        return None, complaints

    def save(
        self,
        progress: Progress,
        *,
        fragments: Sequence[Fragment],
        parameters: Mapping[str, ParameterInfo],
        record: RunRecord,
        attachments: Mapping[str, bytes],
    ) -> str:
        """Write and commit one checkpoint; returns its path.

        Until the manifest is in place the former commit is the newest, whatever happens. A failure on any
        rank fails all of them.
        """
        path, collectives = self.path(progress.step), self._collectives
        with together(collectives, CheckpointError):
            if collectives.rank == 0:
                # A damaged commit of this step must not count, nor what a killed writer left of it.
                storage.remove_tree(path, first=[MANIFEST])
                storage.make_directory(path)
        with together(collectives, CheckpointError):
            name = f"rank_{collectives.rank:05d}.safetensors"
            writer = write_rank_file(storage.join(path, name), fragments)
            file = FileRecord(
                name=name,
                num_bytes=writer.num_bytes,
                checksum=writer.checksum,
                intervals={f.parameter: (f.start, f.stop) for f in fragments},
            )
            prints = {
                (f.parameter, f.state): (str(f.values.dtype), fingerprint(f.values, f.start))
                for f in fragments
            }
        gathered = collectives.all_gather((file, prints))
        with together(collectives, CheckpointError):
            if collectives.rank == 0:
                for attachment, data in attachments.items():
                    storage.commit_bytes(storage.join(path, attachment), data)
                manifest = Manifest(
                    run_id=record.run_id,
                    progress=progress,
                    config=record.config,
                    label_names=record.label_names,
                    tokenizer=record.tokenizer,
                    written_by=record.written_by,
                    parameters=_parameter_records(parameters, [p for _, p in gathered]),
                    files=[f for f, _ in gathered],
                )
                storage.commit_bytes(storage.join(path, MANIFEST), manifest.to_bytes())
        return path

    def retain(self, config: CheckpointConfig) -> list[int]:
        """Delete what is not to be kept: old commits, and drafts older than the newest commit."""
        if self._collectives.rank != 0:
            return []
        steps = committed_steps(self.root)
        gone = expired(steps, config)
        for step in gone:
            storage.remove_tree(self.path(step), first=[MANIFEST])
        newest = max(steps, default=0)
        for step in _steps_in(self.root):
            if step not in steps and step < newest:
                storage.remove_tree(self.path(step))
        return gone


def expired(steps: Sequence[int], config: CheckpointConfig) -> list[int]:
    """Which committed steps are to go: neither among the last ones nor on the kept grid."""
    last = sorted(steps)[-config.keep_last :]
    grid = config.keep_every_steps
    return [s for s in sorted(steps) if s not in last and not (grid and s % grid == 0)]


def committed_steps(root: str) -> list[int]:
    """Steps with a manifest, ascending; a directory without one is a draft."""
    return [s for s in _steps_in(root) if storage.exists(storage.join(root, f"{_STEP}{s:08d}", MANIFEST))]


def _steps_in(root: str) -> list[int]:
    names = (name.removeprefix(_STEP) for name in storage.list_names(root) if name.startswith(_STEP))
    return sorted(int(name) for name in names if name.isdecimal())


def find_checkpoint(path: str) -> Checkpoint:
    """The checkpoint that `path` means: itself, or the newest of a run or of a `checkpoints` directory."""
    if storage.exists(storage.join(path, MANIFEST)):
        return Checkpoint.open(path)
    for root in (storage.join(path, "checkpoints"), path):
        steps = committed_steps(root)
        if steps:
            return Checkpoint.open(storage.join(root, f"{_STEP}{steps[-1]:08d}"))
    raise CheckpointError(
        f"No committed checkpoint at {path} (looked for {MANIFEST}, {_STEP}*/ and checkpoints/{_STEP}*/)."
    )


def _parameter_records(
    parameters: Mapping[str, ParameterInfo],
    prints_by_rank: Sequence[Mapping[tuple[str, str], tuple[str, int]]],
) -> dict[str, ParameterRecord]:
    records = {}
    for name, info in parameters.items():
        states = {}
        for state in STATES:
            parts = [prints[name, state] for prints in prints_by_rank if (name, state) in prints]
            if parts:
                total = sum(part for _, part in parts) % (1 << 64)
                dtype = parts[0][0].removeprefix("torch.")
                states[state] = StateRecord(dtype=dtype, fingerprint=f"{total:016x}")
        records[name] = ParameterRecord(
            shape=info.shape, trainable=info.trainable, updates=info.updates, states=states
        )
    return records
