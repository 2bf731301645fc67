"""Frozen weights of a run: written once beside the commits; later commits refer to these files.

step_00000500/{manifest.json, rank_00000.safetensors, ...}     trainable parameters
frozen_00000500/{rank_00000.safetensors, ...}                  frozen ones, unchanged since step 500
"""

from collections.abc import Sequence

from distft import storage
from distft.checkpoint.committed import SIBLING_PREFIX, Checkpoint
from distft.checkpoint.fingerprint import DigestsByState, fragment_digests, merge_digests
from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.manifest import FileRecord, Manifest, StateRecord
from distft.checkpoint.rank_file import LazyFragment, write_rank_file
from distft.checkpoint.steps import rank_file_name, step_name
from distft.collectives import Collectives, all_or_none
from distft.errors import CheckpointError, StorageError

FROZEN_PREFIX = "frozen_"


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

    def resume_from(self, manifest: Manifest) -> None:
        """Let the next commit refer to the frozen files of `manifest`, if its frozen weights are the same."""
        self._files = [file for file in manifest.files if file.name.startswith(SIBLING_PREFIX)]
        names = {parameter for file in self._files for parameter in file.intervals}
        self._records = {
            name: manifest.parameters[name].states[WEIGHT] for name in names if name in manifest.parameters
        }

    def reuse_or_write(
        self, fragments: Sequence[Fragment], step: int
    ) -> tuple[list[FileRecord], dict[str, StateRecord]]:
        """Files and records of the frozen weights; writes them unless an earlier commit's are the same.

        All ranks call this together, each with its own fragments.
        """
        self._directories_by_step.pop(step, None)
        collectives = self._collectives
        if not any(collectives.all_gather(bool(fragments))):
            return [], {}
        records = self._merged_records(fragments)
        if records != self._records:
            self._files, self._records = self._write(fragments, step), records
        return self._files, records

    def _merged_records(self, fragments: Sequence[Fragment]) -> dict[str, StateRecord]:
        intervals = [(f.parameter, f.start, f.stop) for f in fragments]
        if intervals != self._own_intervals:  # frozen values do not change: one digest serves all saves
            self._own_intervals, self._own_digests = intervals, fragment_digests(fragments)
        records = merge_digests(self._collectives.all_gather(self._own_digests))
        return {name: states[WEIGHT] for name, states in records.items()}

    def _write(self, fragments: Sequence[Fragment], step: int) -> list[FileRecord]:
        collectives = self._collectives
        directory = f"{FROZEN_PREFIX}{step:08d}"
        with all_or_none(collectives, StorageError):
            if collectives.rank == 0:
                storage.remove_tree(storage.join(self._root, directory))  # a killed writer's files
        with all_or_none(collectives, StorageError):
            name = rank_file_name(collectives.rank)
            file = write_rank_file(
                storage.join(self._root, directory, name),
                [LazyFragment.of(fragment) for fragment in fragments],
                name=f"{SIBLING_PREFIX}{directory}/{name}",
            )
        return collectives.all_gather(file)

    def directories_of(self, step: int) -> set[str]:
        """Names of the frozen directories that the commit of `step` refers to; none if it is damaged."""
        if step not in self._directories_by_step:
            try:
                files = Checkpoint.open(storage.join(self._root, step_name(step))).manifest.files
            except CheckpointError:
                files = []
            self._directories_by_step[step] = {
                file.name.removeprefix(SIBLING_PREFIX).partition("/")[0]
                for file in files
                if file.name.startswith(SIBLING_PREFIX)
            }
        return self._directories_by_step[step]
