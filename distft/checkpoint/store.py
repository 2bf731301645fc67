"""The checkpoints of one run below one directory: find the latest valid one, save, prune.

Several starts of one run may overlap: one was cut off or suspended when another took over. So that no order
of their operations loses a commit or mixes two,
- a start claims the directory before it lists the commits that it resumes from and keeps;
- its data files have names of its own, so it never overwrites a file that a commit may refer to;
- its manifest replaces only the one, or the absence of one, that it saw when the save began;
- it looks at the claim before each manifest, and between listing names and deleting them.
tests/checkpoint/test_two_starts.py runs every order. On an object store, whose puts cannot be taken back, an
earlier start may commit late a step that this one has deleted: it does not count, and is deleted again.
"""

import secrets
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distft import storage
from distft.checkpoint.committed import Checkpoint, read_manifest
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.fingerprint import DigestsByState, fragment_digests, merge_digests
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.frozen import FrozenWeights
from distft.checkpoint.manifest import MANIFEST, BaseRecord, Manifest, Progress, StateRecord
from distft.checkpoint.rank_file import LazyFragment, write_rank_file
from distft.checkpoint.retention import delete_own_files, delete_unneeded, steps_to_prune
from distft.checkpoint.snapshot import CheckpointSnapshot
from distft.checkpoint.steps import committed_steps, own_files, rank_file_name, step_name
from distft.checkpoint.writer_fence import WriterFence
from distft.collectives import Collectives, all_or_none
from distft.errors import CheckpointError, StorageError


@dataclass(frozen=True, slots=True)
class LatestValid:
    """Result of the search for the newest undamaged commit."""

    checkpoint: Checkpoint | None
    damage: list[str]  # a message for each newer commit, all of which are damaged
    damaged_steps: frozenset[int]  # the steps of these commits
    listed: tuple[tuple[int, ...], str | None]  # all committed steps, and the version of the newest manifest


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a save writes."""

    attempt: str  # distinguishes its files from those of other starts
    versions: dict[str, str | None]  # of the manifest and the attachments when the save began
    has_foreign_files: bool  # of other starts, to be deleted after the commit


class CheckpointStore:
    """The checkpoints of one run. All ranks call every method together."""

    def __init__(
        self,
        root: str,
        collectives: Collectives,
        attach_base: Callable[[Checkpoint], None] = lambda _: None,
    ) -> None:
        """`attach_base` opens what a checkpoint refers to; without it, such weights are not verified."""
        self.root = root
        self._attach_base = attach_base
        self._collectives = collectives
        self._fence = WriterFence(root)
        self._frozen = FrozenWeights(root, collectives)
        self._damaged_steps: set[int] = set()  # committed, but damaged
        # Commits that count for retention, once this start has chosen what to resume from: an earlier start
        # may add others, late, whose files this one has deleted.
        self._counted_steps: set[int] | None = None
        self._best_step: int | None = None  # by validation, for a run with early stopping: it stays
        self._untidy: dict[int, set[str]] = {}  # step whose directory may have others' files -> names to keep

    def path(self, step: int) -> str:
        return storage.join(self.root, step_name(step))

    def become_writer(self, launch: str | None = None) -> None:
        """Take over writing: the next save of any earlier start of this run raises `SupersededError`.

        `launch` names the launcher if it starts failed ranks again by itself; it raises `SupersededError` if
        an earlier start of this launch was itself taken over from.
        """
        with all_or_none(self._collectives, StorageError):
            if self._collectives.rank == 0:
                self._fence.acquire(launch)

    def find_latest_valid(self) -> LatestValid:
        """Find the newest undamaged commit by reading every byte; changes nothing.

        Raises `UnreachableError` if the storage does not answer: a failure of the network or of a disk never
        makes the search skip a commit.
        """
        damage: list[str] = []
        damaged_steps: set[int] = set()
        listed = self._list_commits()
        for step in reversed(listed[0]):
            try:
                checkpoint = self.open(step)
                checkpoint.verify(self._collectives)
            except CheckpointError as error:
                damage.append(f"step {step}: {error}")
                damaged_steps.add(step)
            else:
                return LatestValid(checkpoint, damage, frozenset(damaged_steps), listed)
        return LatestValid(None, damage, frozenset(damaged_steps), listed)

    def is_still_latest(self, found: LatestValid) -> bool:
        """Whether no step was committed or deleted since the search that returned `found`."""
        return self._list_commits() == found.listed

    def _list_commits(self) -> tuple[tuple[int, ...], str | None]:
        steps: list[int] = []
        newest = None
        with all_or_none(self._collectives, CheckpointError):
            if self._collectives.rank == 0:
                with storage.unreadable_as_unreachable(self.root):
                    steps = committed_steps(self.root)
                    if steps:
                        newest = storage.version(storage.join(self.path(steps[-1]), MANIFEST))
        return self._collectives.broadcast((tuple(steps), newest))

    def open(self, step: int) -> Checkpoint:
        """The commit of `step` on all ranks; one of them reads it. Raises `CheckpointError` on all ranks."""
        path, data = self.path(step), b""
        with all_or_none(self._collectives, CheckpointError):
            if self._collectives.rank == 0:
                data = zlib.compress(read_manifest(path), level=1)
        data = self._collectives.broadcast(data)
        with all_or_none(self._collectives, CheckpointError):
            manifest = Manifest.from_bytes(zlib.decompress(data), storage.join(path, MANIFEST))
            if manifest.progress.step != step:
                raise CheckpointError(
                    f"{path} contains the checkpoint of step {manifest.progress.step}, according to its "
                    "manifest: it was put there by mistake."
                )
            checkpoint = Checkpoint(path, manifest)
            self._attach_base(checkpoint)
        return checkpoint

    def refer_to(self, base: BaseRecord) -> None:
        """As `FrozenWeights.refer_to`."""
        self._frozen.refer_to(base)

    def resume_from(self, found: LatestValid) -> None:
        """Continue after `found`: refer to its frozen weights, and treat the damaged steps as uncommitted."""
        self._damaged_steps |= found.damaged_steps
        self._counted_steps = set(found.listed[0])
        if found.checkpoint is not None:
            self._frozen.resume_from(found.checkpoint.manifest)
            self._set_best(found.checkpoint.manifest.progress)

    def _set_best(self, progress: Progress) -> None:
        best = progress.best_of_run
        self._best_step = None if best is None or best.value is None else best.step

    def save(self, snapshot: CheckpointSnapshot) -> str:
        """Write and commit one checkpoint; returns its path.

        The previous commit stays the newest until the manifest is in place. If any rank fails, all raise.
        Raises `SupersededError` after another process has called `become_writer`.
        """
        try:
            return self._save(snapshot)
        except StorageError:
            self._raise_if_superseded()  # a later start deletes files that this one is writing
            raise

    def _save(self, snapshot: CheckpointSnapshot) -> str:
        step, collectives = snapshot.progress.step, self._collectives
        path = self.path(step)
        place = _Place("", {}, has_foreign_files=False)
        with all_or_none(collectives, StorageError):
            if collectives.rank == 0:
                place = self._prepare(step, snapshot)
        attempt = collectives.broadcast(place.attempt)

        trainable = [f for f in snapshot.fragments if not snapshot.parameters[f.parameter].is_constant]
        frozen = [f for f in snapshot.fragments if snapshot.parameters[f.parameter].is_constant]
        frozen_files, frozen_records, base = self._frozen.reuse_or_write(frozen, step, attempt)
        with all_or_none(collectives, StorageError):
            name = rank_file_name(collectives.rank, attempt)
            file = write_rank_file(
                storage.join(path, name), [LazyFragment.of(fragment) for fragment in trainable], name=name
            )
            digests = fragment_digests(trainable)
        gathered = collectives.gather((file, digests))

        with all_or_none(collectives, StorageError):
            if gathered is not None:
                files = [file for file, _ in gathered] + frozen_files
                records = _merge_records([digests for _, digests in gathered], frozen_records)
                self._commit(snapshot, snapshot.manifest(files, records, base), place)
        self._damaged_steps.discard(step)
        self._set_best(snapshot.progress)
        if self._counted_steps is not None:
            self._counted_steps.add(step)
        return path

    def _prepare(self, step: int, snapshot: CheckpointSnapshot) -> _Place:
        """Make the directory of a step ready for this start's files, on rank 0."""
        path = self.path(step)
        drafts = storage.list_temporary_files(path)
        self._fence.check()
        for draft in drafts:  # an earlier start cannot commit this step any more
            storage.remove(storage.join(path, draft))
        names = own_files(storage.list_names(path))
        is_committed = storage.exists(storage.join(path, MANIFEST))
        if not is_committed and not storage.is_url(path):
            # Otherwise each start that is killed in a save would leave a whole checkpoint on the disk. An
            # object store cannot take back a put, so there they are deleted after the commit.
            delete_own_files(path, check=self._fence.check)
            self._delete_unreferenced_frozen(step)
            names = []
        storage.make_directory(path)
        # The files of a commit are never overwritten.
        attempt = secrets.token_hex(4) if is_committed else self._fence.name
        versions = {
            name: storage.version(storage.join(path, name)) for name in (MANIFEST, *snapshot.attachments)
        }
        return _Place(attempt, versions, has_foreign_files=bool(names))

    def _delete_unreferenced_frozen(self, step: int) -> None:
        """Delete frozen weights that starts wrote at this step without committing it."""
        found = [name for name, number in self._frozen.directories() if number == step]
        if found:
            for name in set(found) - self._frozen.directories_in_use(committed_steps(self.root)):
                delete_own_files(storage.join(self.root, name), check=self._fence.check)

    def _commit(self, snapshot: CheckpointSnapshot, manifest: Manifest, place: _Place) -> None:
        """Write the attachments and, last, the manifest, on rank 0."""
        step = snapshot.progress.step
        data = {**snapshot.attachments, MANIFEST: manifest.to_bytes()}
        for name, content in data.items():
            where = storage.join(self.path(step), name)
            expected = place.versions[name]
            # An earlier start may come between on an object store: this one, which has the claim, replaces
            # its file. In the earlier start, `check` raises.
            while not storage.commit_unless_changed(
                where, content, expected=expected, confirm=self._fence.check
            ):
                self._fence.check()
                expected = storage.version(where)
        if place.has_foreign_files:
            own = {file.name for file in manifest.files}
            self._untidy[step] = own | data.keys()

    def _raise_if_superseded(self) -> None:
        with all_or_none(self._collectives, StorageError):
            if self._collectives.rank == 0:
                self._fence.check()

    def valid_steps(self) -> list[int]:
        """Committed steps that count: without those known to be damaged, ascending."""
        counted = self._counted_steps
        return [
            step
            for step in committed_steps(self.root)
            if step not in self._damaged_steps and (counted is None or step in counted)
        ]

    def steps_to_prune(self, config: CheckpointConfig) -> list[int]:
        """The commits that `config` does not keep, ascending."""
        return steps_to_prune(self.valid_steps(), config, self._best_step)

    def prune(self, config: CheckpointConfig) -> list[int]:
        """Delete the commits that `config` does not keep; returns their steps, on rank 0.

        Also deletes uncommitted steps, steps known to be damaged, and frozen weights that are no longer
        needed, if they are older than the newest valid commit, and other starts' files beside this start's
        commits. If rank 0 fails, all ranks raise; the next call tries again.
        """
        pruned: list[int] = []
        with all_or_none(self._collectives, StorageError):
            if self._collectives.rank == 0:
                self._fence.check()
                steps = self.valid_steps()
                pruned = self.steps_to_prune(config)
                delete_unneeded(self.root, steps, pruned, self._frozen, self._fence.check)
                if self._counted_steps is not None:
                    self._counted_steps -= set(pruned)
                for step, names in list(self._untidy.items()):
                    if step in steps and step not in pruned:
                        delete_own_files(self.path(step), check=self._fence.check, keep=names)
                    del self._untidy[step]
        return pruned


def _merge_records(
    digests: Sequence[DigestsByState], frozen: dict[str, StateRecord]
) -> dict[str, dict[str, StateRecord]]:
    return merge_digests(digests) | {name: {WEIGHT: record} for name, record in frozen.items()}
