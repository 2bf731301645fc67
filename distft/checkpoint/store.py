"""The checkpoints of one run below one directory: find the latest valid one, save, prune."""

from dataclasses import dataclass

from distft import storage
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.fingerprint import fragment_digests, merge_digests
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.frozen import FrozenWeights
from distft.checkpoint.manifest import MANIFEST
from distft.checkpoint.rank_file import LazyFragment, write_rank_file
from distft.checkpoint.retention import delete_unneeded, steps_to_prune
from distft.checkpoint.snapshot import CheckpointSnapshot
from distft.checkpoint.steps import committed_steps, rank_file_name, step_name
from distft.checkpoint.writer_fence import WriterFence
from distft.collectives import Collectives, all_or_none
from distft.errors import CheckpointError, StorageError


@dataclass(frozen=True, slots=True)
class LatestValid:
    """Result of the search for the newest undamaged commit."""

    checkpoint: Checkpoint | None
    damage: list[str]  # a message for each newer commit, all of which are damaged
    damaged_steps: frozenset[int]  # the steps of these commits


class CheckpointStore:
    """The checkpoints of one run. All ranks call every method together."""

    def __init__(self, root: str, collectives: Collectives) -> None:
        self.root = root
        self._collectives = collectives
        self._fence = WriterFence(root)
        self._frozen = FrozenWeights(root, collectives)
        self._damaged_steps: set[int] = set()  # committed, but damaged

    def path(self, step: int) -> str:
        return storage.join(self.root, step_name(step))

    def become_writer(self) -> None:
        """Take over writing: the next save of any earlier start of this run raises `SupersededError`."""
        with all_or_none(self._collectives, StorageError):
            if self._collectives.rank == 0:
                self._fence.acquire()

    def find_latest_valid(self) -> LatestValid:
        """Find the newest undamaged commit by reading every byte; changes nothing.

        Raises `UnreachableError` if the storage does not answer: a network failure never makes the search
        skip a commit.
        """
        damage: list[str] = []
        damaged_steps: set[int] = set()
        steps: list[int] = []
        with all_or_none(self._collectives, CheckpointError):
            if self._collectives.rank == 0:
                steps = committed_steps(self.root)
        for step in reversed(self._collectives.broadcast(steps)):
            try:
                with all_or_none(self._collectives, CheckpointError):
                    checkpoint = self._open(step)
                checkpoint.verify(self._collectives)
            except CheckpointError as error:
                damage.append(f"step {step}: {error}")
                damaged_steps.add(step)
            else:
                return LatestValid(checkpoint, damage, frozenset(damaged_steps))
        return LatestValid(None, damage, frozenset(damaged_steps))

    def _open(self, step: int) -> Checkpoint:
        checkpoint = Checkpoint.open(self.path(step))
        if checkpoint.step != step:
            raise CheckpointError(
                f"{checkpoint.path} contains the checkpoint of step {checkpoint.step}, according to its "
                "manifest: it was put there by mistake."
            )
        return checkpoint

    def resume_from(self, found: LatestValid) -> None:
        """Continue after `found`: refer to its frozen weights, and treat the damaged steps as uncommitted."""
        self._damaged_steps |= found.damaged_steps
        if found.checkpoint is not None:
            self._frozen.resume_from(found.checkpoint.manifest)

    def save(self, snapshot: CheckpointSnapshot) -> str:
        """Write and commit one checkpoint; returns its path.

        The previous commit stays the newest until the manifest is in place. If any rank fails, all raise.
        Raises `SupersededError` after another process has called `become_writer`.
        """
        step, collectives = snapshot.progress.step, self._collectives
        path = self.path(step)
        with all_or_none(collectives, StorageError):
            if collectives.rank == 0:
                self._fence.check()
                # A damaged commit of this step, or a killed writer's files.
                storage.remove_tree(path, first=[MANIFEST])
                storage.make_directory(path)
        self._damaged_steps.discard(step)

        trainable = [f for f in snapshot.fragments if snapshot.parameters[f.parameter].trainable]
        frozen = [f for f in snapshot.fragments if not snapshot.parameters[f.parameter].trainable]
        frozen_files, frozen_records = self._frozen.reuse_or_write(frozen, step)
        with all_or_none(collectives, StorageError):
            name = rank_file_name(collectives.rank)
            file = write_rank_file(
                storage.join(path, name), [LazyFragment.of(fragment) for fragment in trainable], name=name
            )
            digests = fragment_digests(trainable)
        gathered = collectives.all_gather((file, digests))

        with all_or_none(collectives, StorageError):
            if collectives.rank == 0:
                for attachment, data in snapshot.attachments.items():
                    storage.commit_bytes(storage.join(path, attachment), data)
                files = [file for file, _ in gathered] + frozen_files
                records = merge_digests(digests for _, digests in gathered)
                records |= {name: {WEIGHT: record} for name, record in frozen_records.items()}
                manifest = snapshot.manifest(files, records)
                self._fence.check()
                storage.commit_bytes(storage.join(path, MANIFEST), manifest.to_bytes())  # the commit
        return path

    def valid_steps(self) -> list[int]:
        """Committed steps without those known to be damaged, ascending."""
        return [step for step in committed_steps(self.root) if step not in self._damaged_steps]

    def prune(self, config: CheckpointConfig) -> list[int]:
        """Delete the commits that `config` does not keep; returns their steps, on rank 0.

        Also deletes uncommitted steps, steps known to be damaged, and frozen weights that are no longer
        needed, if they are older than the newest valid commit. If rank 0 fails, all ranks raise.
        """
        pruned: list[int] = []
        with all_or_none(self._collectives, StorageError):
            if self._collectives.rank == 0:
                steps = self.valid_steps()
                pruned = steps_to_prune(steps, config)
                delete_unneeded(self.root, steps, pruned, self._frozen)
        return pruned
