"""Frozen weights of a run: written once beside the commits; later commits refer to these files.

step_00000500/{manifest.json, rank_00000.safetensors, ...}     trainable parameters
frozen_00000500/{rank_00000.safetensors, ...}                  frozen ones, unchanged since step 500

In a run, the names carry that of the start that wrote them: `frozen_00000500_0123abcd`.
"""

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence

from distft import storage
from distft.checkpoint.committed import SIBLING_PREFIX, Checkpoint
from distft.checkpoint.fingerprint import DigestsByState, fragment_digests, merge_digests
from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.manifest import BaseRecord, FileRecord, Manifest, StateRecord
from distft.checkpoint.rank_file import LazyFragment, write_rank_file
from distft.checkpoint.steps import rank_file_name, step_name
from distft.collectives import Collectives, all_or_none
from distft.errors import CheckpointError, StorageError

FROZEN_PREFIX = "frozen_"
_DIRECTORY = re.compile(rf"{FROZEN_PREFIX}(?P<step>\d+)(_\w+)?")


class FrozenWeights:
    """The files of frozen weights below `root`."""

    def __init__(self, root: str, collectives: Collectives) -> None:
        self._root = root
        self._collectives = collectives
        # The files that the next commit may refer to, and the weights in them.
        self._files: list[FileRecord] = []
        self._records: dict[str, StateRecord] = {}
        self._own_intervals: list[tuple[str, int, int]] = []
        self._own_digests: DigestsByState = {}
        self._directories_by_step: dict[int, set[str]] = {}
        # Where weights are that no commit holds, and these; None: those that are frozen in the first commit.
        self._base: BaseRecord | None = None
        self._base_records: dict[str, StateRecord] | None = None

    def refer_to(self, base: BaseRecord) -> None:
        """Let commits of a new run leave out the weights of `base` that do not change from its start on."""
        self._base = base

    def resume_from(self, manifest: Manifest) -> None:
        """Let the next commit refer to the frozen files of `manifest`, if its frozen weights are the same."""
        self._base, self._base_records = manifest.base, {}
        for name in () if manifest.base is None else manifest.base.parameters:
            self._base_records[name] = manifest.parameters[name].states[WEIGHT]
        self._files = [file for file in manifest.files if file.name.startswith(SIBLING_PREFIX)]
        names = {parameter for file in self._files for parameter in file.intervals}
        self._records = {
            name: manifest.parameters[name].states[WEIGHT] for name in names if name in manifest.parameters
        }

    def reuse_or_write(
        self, fragments: Sequence[Fragment], step: int, attempt: str
    ) -> tuple[list[FileRecord], dict[str, StateRecord], BaseRecord | None]:
        """Files and records of the frozen weights; writes those that no earlier commit and no base has.

        All ranks call this together, each with its own fragments; the result is complete on rank 0.
        `attempt` distinguishes the files from those of other starts.
        """
        self._directories_by_step.pop(step, None)
        collectives = self._collectives
        digests = collectives.gather(self._digests(fragments))
        records = {name: states[WEIGHT] for name, states in merge_digests(digests or ()).items()}
        in_base: set[str] = collectives.broadcast(self._names_in_base(records))
        own = {name: record for name, record in records.items() if name not in in_base}
        if collectives.broadcast(own != self._records):
            kept = [fragment for fragment in fragments if fragment.parameter not in in_base]
            files = self._write(kept, step, attempt) if collectives.broadcast(bool(own)) else []
            self._files, self._records = files, own
        if self._base is None or not in_base:
            return self._files, records, None
        names = tuple(name for name in records if name in in_base)
        return self._files, records, self._base.model_copy(update={"parameters": names})

    def _names_in_base(self, records: Mapping[str, StateRecord]) -> set[str]:
        """The weights that are as in the base, on rank 0."""
        if self._base is None or self._collectives.rank > 0:
            return set()
        if self._base_records is None:
            self._base_records = {n: records[n] for n in self._base.parameters if n in records}
        return {name for name, record in records.items() if self._base_records.get(name) == record}

    def _digests(self, fragments: Sequence[Fragment]) -> DigestsByState:
        intervals = [(f.parameter, f.start, f.stop) for f in fragments]
        if intervals != self._own_intervals:  # frozen values do not change: one digest serves all saves
            self._own_intervals, self._own_digests = intervals, fragment_digests(fragments)
        return self._own_digests

    def _write(self, fragments: Sequence[Fragment], step: int, attempt: str) -> list[FileRecord]:
        collectives = self._collectives
        directory = ""
        with all_or_none(collectives, StorageError):
            if collectives.rank == 0:
                directory = self._new_directory(step, attempt)
        directory = collectives.broadcast(directory)
        with all_or_none(collectives, StorageError):
            name = rank_file_name(collectives.rank)
            file = write_rank_file(
                storage.join(self._root, directory, name),
                [LazyFragment.of(fragment) for fragment in fragments],
                name=f"{SIBLING_PREFIX}{directory}/{name}",
            )
        return collectives.gather(file) or []

    def _new_directory(self, step: int, attempt: str) -> str:
        """A name that is not in use: other commits may refer to the files in an existing directory."""
        name = f"{FROZEN_PREFIX}{step:08d}{attempt and f'_{attempt}'}"
        if storage.is_directory(storage.join(self._root, name)):
            name = f"{FROZEN_PREFIX}{step:08d}_{secrets.token_hex(4)}"
        return name

    def directories(self) -> list[tuple[str, int]]:
        """The directories of frozen weights, each with the step in its name."""
        found = ((name, _DIRECTORY.fullmatch(name)) for name in storage.list_names(self._root))
        return [(name, int(match["step"])) for name, match in found if match is not None]

    def directories_in_use(self, steps: Iterable[int]) -> set[str]:
        """Names of the frozen directories that the commits of `steps`, or the next save, refer to."""
        return _directories(self._files).union(*(self.directories_of(step) for step in steps))

    def directories_of(self, step: int) -> set[str]:
        """Names of the frozen directories that the commit of `step` refers to; none if it is damaged."""
        if step not in self._directories_by_step:
            try:
                files = Checkpoint.open(storage.join(self._root, step_name(step))).manifest.files
            except CheckpointError:
                files = []
            self._directories_by_step[step] = _directories(files)
        return self._directories_by_step[step]


def _directories(files: Iterable[FileRecord]) -> set[str]:
    names = (file.name for file in files if file.name.startswith(SIBLING_PREFIX))
    return {name.removeprefix(SIBLING_PREFIX).partition("/")[0] for name in names}
