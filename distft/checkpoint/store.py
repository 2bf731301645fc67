"""The checkpoints of one run under one directory: write, commit, retain.

Frozen weights never change, so they are written once, beside the commits, and later commits refer to them:

    step_00000500/{manifest.json, rank_00000.safetensors, ...}     what learns
    frozen_00000500/{rank_00000.safetensors, ...}                  the rest, since step 500
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from distft import storage
from distft.checkpoint.claim import Claim
from distft.checkpoint.committed import BESIDE, STEP, Checkpoint, committed_steps, steps_in
from distft.checkpoint.fragments import STATES, WEIGHT, Fragment, fingerprint
from distft.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    GroupRecord,
    Manifest,
    ParameterRecord,
    ProbeRecord,
    Progress,
    StateRecord,
    TokenizerRecord,
)
from distft.checkpoint.rank_file import Entry, write_rank_file
from distft.collectives import Collectives, together
from distft.config import Settings
from distft.errors import CheckpointError, StorageError

FROZEN = "frozen_"

Print = tuple[str, int]  # dtype, and the fingerprint of a fragment
PrintsByState = Mapping[tuple[str, str], Print]


class CheckpointConfig(Settings):
    """When a run saves, and what it keeps."""

    directory: str | None = None  # a path or a URL that all ranks reach; None: checkpoints/ in run_dir
    every_steps: int | None = Field(default=None, ge=1)  # besides the last step, which is always saved
    keep_last: int = Field(default=2, ge=1)
    keep_every_steps: int | None = Field(default=None, ge=1)  # steps that are kept for good
    resume: bool = True  # go on from the newest good commit in the run's directory, if there is one
    in_background: bool = True  # train on while a copy in host memory is written; needs room for that copy


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """What a manifest says besides the state itself."""

    run_id: str
    config: dict[str, Any]
    label_names: list[str] | None
    tokenizer: TokenizerRecord | None
    written_by: dict[str, Any]
    groups: list[GroupRecord]
    tied: dict[str, str]
    probe: ProbeRecord | None


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter of the model that is being saved."""

    shape: tuple[int, ...]
    trainable: bool
    updates: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """All that one commit is made of; this rank's fragments."""

    progress: Progress
    fragments: Sequence[Fragment]
    parameters: Mapping[str, ParameterInfo]
    record: RunRecord
    attachments: Mapping[str, bytes]  # further files, by name


class CheckpointStore:
    """The checkpoints of one run. Every method is called by all ranks together."""

    def __init__(self, root: str, collectives: Collectives) -> None:
        self.root = root
        self._collectives = collectives
        self._claim = Claim(root)
        self._frozen_files: list[FileRecord] = []  # of the last commit that this process wrote or resumed
        self._frozen_prints: dict[str, StateRecord] = {}
        self._frozen_here: tuple[list[tuple[str, int, int]], PrintsByState] = ([], {})  # this rank's
        self._frozen_by_step: dict[int, set[str]] = {}  # directories that a commit refers to
        self._damaged: set[int] = set()  # steps with a manifest that nothing can be loaded by

    def path(self, step: int) -> str:
        return storage.join(self.root, f"{STEP}{step:08d}")

    def claim(self) -> None:
        """Write from now on; an earlier start of the run that still lives fails at its next save."""
        with together(self._collectives, StorageError):
            if self._collectives.rank == 0:
                self._claim.take()

    def newest_good(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest commit that is whole, and what was wrong with each newer one.

        Raises `UnreachableError` where that cannot be found out: no commit is passed over for a fault of the
        network.
        """
        complaints: list[str] = []
        steps: list[int] = []
        with together(self._collectives, CheckpointError):
            if self._collectives.rank == 0:
                steps = committed_steps(self.root)
        for step in reversed(self._collectives.broadcast(steps)):
            try:
                with together(self._collectives, CheckpointError):
                    checkpoint = Checkpoint.open(self.path(step))
                    if checkpoint.step != step:
                        raise CheckpointError(
                            f"{checkpoint.path} holds the checkpoint of step {checkpoint.step}, by its "
                            "manifest: it was put there by mistake."
                        )
                checkpoint.verify(self._collectives)
            except CheckpointError as error:
                complaints.append(f"step {step}: {error}")
                self._damaged.add(step)
                continue
            self._remember_frozen(checkpoint.manifest)
            return checkpoint, complaints
        return None, complaints

    def _remember_frozen(self, manifest: Manifest) -> None:
        """What a later commit may refer to, if it has the same frozen weights."""
        self._frozen_files = [file for file in manifest.files if file.name.startswith(BESIDE)]
        held = {parameter for file in self._frozen_files for parameter in file.intervals}
        self._frozen_prints = {
            name: manifest.parameters[name].states[WEIGHT] for name in held if name in manifest.parameters
        }

    def save(self, draft: Draft) -> str:
        """Write and commit one checkpoint; returns its path.

        Until the manifest is in place the former commit is the newest, whatever happens. A failure on any
        rank fails all of them. Raises `SupersededError` after another process's `claim`.
        """
        step, collectives = draft.progress.step, self._collectives
        path = self.path(step)
        with together(collectives, StorageError):
            if collectives.rank == 0:
                self._claim.check()
                # A damaged commit of this step must not count, nor what a killed writer left of it.
                storage.remove_tree(path, first=[MANIFEST])
                storage.make_directory(path)
                self._frozen_by_step.pop(step, None)
                self._damaged.discard(step)
        moving = [f for f in draft.fragments if draft.parameters[f.parameter].trainable]
        frozen = [f for f in draft.fragments if not draft.parameters[f.parameter].trainable]
        frozen_files, frozen_prints = self._frozen(frozen, step)
        with together(collectives, StorageError):
            file = self._write(storage.join(path, self._file_name), moving)
            prints = _prints(moving)
        gathered = collectives.all_gather((file, prints))
        with together(collectives, StorageError):
            if collectives.rank == 0:
                for attachment, data in draft.attachments.items():
                    storage.commit_bytes(storage.join(path, attachment), data)
                files = [file for file, _ in gathered] + frozen_files
                records = _state_records([prints for _, prints in gathered])
                for name, state_record in frozen_prints.items():
                    records[name] = {WEIGHT: state_record}
                manifest = _manifest(draft, files, records)
                self._claim.check()
                storage.commit_bytes(storage.join(path, MANIFEST), manifest.to_bytes())
        return path

    @property
    def _file_name(self) -> str:
        return f"rank_{self._collectives.rank:05d}.safetensors"

    def _write(self, path: str, fragments: Sequence[Fragment], name: str | None = None) -> FileRecord:
        writer = write_rank_file(path, [Entry.of(fragment) for fragment in fragments])
        return FileRecord(
            name=name or self._file_name,
            num_bytes=writer.num_bytes,
            checksum=writer.checksum,
            intervals={f.parameter: (f.start, f.stop) for f in fragments},
        )

    def _frozen(
        self, fragments: Sequence[Fragment], step: int
    ) -> tuple[list[FileRecord], dict[str, StateRecord]]:
        """Files and records of the frozen weights: those of an earlier commit, or new ones if they differ."""
        collectives = self._collectives
        if not any(collectives.all_gather(bool(fragments))):
            return [], {}
        places = [(f.parameter, f.start, f.stop) for f in fragments]
        if places != self._frozen_here[0]:  # they do not change, so they are looked at once
            self._frozen_here = places, _prints(fragments)
        gathered = collectives.all_gather(self._frozen_here[1])
        records = {name: states[WEIGHT] for name, states in _state_records(gathered).items()}
        if records == self._frozen_prints:
            return self._frozen_files, records
        directory = f"{FROZEN}{step:08d}"
        with together(collectives, StorageError):
            if collectives.rank == 0:
                storage.remove_tree(storage.join(self.root, directory))  # what a killed writer left
        with together(collectives, StorageError):
            path = storage.join(self.root, directory, self._file_name)
            file = self._write(path, fragments, name=f"{BESIDE}{directory}/{self._file_name}")
        self._frozen_files, self._frozen_prints = collectives.all_gather(file), records
        return self._frozen_files, records

    def retain(self, config: CheckpointConfig) -> list[int]:
        """Delete what is not to be kept: old commits, frozen weights of none, drafts before the newest.

        A commit that `newest_good` found damaged is one of the drafts. Returns the steps of the old commits,
        on rank 0. A failure on it fails all ranks.
        """
        gone: list[int] = []
        with together(self._collectives, StorageError):
            if self._collectives.rank == 0:
                gone = self._retain(config)
        return gone

    def good_steps(self) -> list[int]:
        """Committed steps, ascending, without those that `newest_good` found damaged."""
        return [step for step in committed_steps(self.root) if step not in self._damaged]

    def _retain(self, config: CheckpointConfig) -> list[int]:
        steps = self.good_steps()
        gone = expired(steps, config)
        for step in gone:
            storage.remove_tree(self.path(step), first=[MANIFEST])
        newest = max(steps, default=0)
        for step in steps_in(self.root):
            if step not in steps and step < newest:
                storage.remove_tree(self.path(step), first=[MANIFEST])
        needed = {d for step in steps if step not in gone for d in self._frozen_directories(step)}
        for name in storage.list_names(self.root):
            number = name.removeprefix(FROZEN)
            if name.startswith(FROZEN) and name not in needed and number.isdecimal() and int(number) < newest:
                storage.remove_tree(storage.join(self.root, name))
        return gone

    def _frozen_directories(self, step: int) -> set[str]:
        if step not in self._frozen_by_step:
            try:
                files = Checkpoint.open(self.path(step)).manifest.files
            except CheckpointError:  # damaged: nothing can be loaded by it
                files = []
            self._frozen_by_step[step] = {
                file.name.removeprefix(BESIDE).partition("/")[0]
                for file in files
                if file.name.startswith(BESIDE)
            }
        return self._frozen_by_step[step]


def expired(steps: Sequence[int], config: CheckpointConfig) -> list[int]:
    """Which committed steps are to go: neither among the last ones nor on the kept grid."""
    last = sorted(steps)[-config.keep_last :]
    grid = config.keep_every_steps
    return [s for s in sorted(steps) if s not in last and not (grid and s % grid == 0)]


def _prints(fragments: Sequence[Fragment]) -> dict[tuple[str, str], Print]:
    return {(f.parameter, f.state): (str(f.values.dtype), fingerprint(f.values, f.start)) for f in fragments}


def _state_records(prints_by_rank: Sequence[PrintsByState]) -> dict[str, dict[str, StateRecord]]:
    """Parameter -> state -> its record, with the fingerprints of all ranks' fragments added up."""
    totals: dict[tuple[str, str], Print] = {}
    for prints in prints_by_rank:
        for key, (dtype, part) in prints.items():
            totals[key] = dtype, (totals.get(key, ("", 0))[1] + part) % (1 << 64)
    records: dict[str, dict[str, StateRecord]] = {}
    for (name, state), (dtype, total) in totals.items():
        record = StateRecord(dtype=dtype.removeprefix("torch."), fingerprint=f"{total:016x}")
        records.setdefault(name, {})[state] = record
    return records


def _manifest(
    draft: Draft, files: list[FileRecord], records: Mapping[str, Mapping[str, StateRecord]]
) -> Manifest:
    run = draft.record
    return Manifest(
        run_id=run.run_id,
        progress=draft.progress,
        config=run.config,
        label_names=run.label_names,
        tokenizer=run.tokenizer,
        written_by=run.written_by,
        groups=run.groups,
        tied=run.tied,
        probe=run.probe,
        parameters={
            name: ParameterRecord(
                shape=info.shape,
                trainable=info.trainable,
                updates=info.updates,
                states={state: records[name][state] for state in STATES if state in records[name]},
            )
            for name, info in draft.parameters.items()
        },
        files=files,
    )
