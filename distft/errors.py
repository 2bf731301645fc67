"""Everything distft raises on purpose.

DistftError
├── ConfigError        the run was described wrongly; raised before any GPU is touched
├── DataError          text, labels, or token shards are missing, damaged, or of another kind
├── StorageError       a file cannot be written or read back: full disk, missing or damaged bytes
│   └── UnreachableError   its place cannot be used now: network, service, rights; says nothing of the file
├── CheckpointError    a checkpoint is missing, half-written, damaged, or does not fit this run
│   └── SupersededError    another start of the run writes its checkpoints
├── TrainingError      the run itself failed: non-finite losses in a row, a rank that hangs
├── Preempted          the run was asked to stop, and has saved its state
└── LaunchError        workers could not be placed, started, or kept alive
"""

from collections.abc import Iterator
from contextlib import contextmanager


class DistftError(Exception):
    """Base class: catch this to catch every failure distft foresees."""

    exit_code = 1  # of the command line: a failure of the run


class ConfigError(DistftError):
    """The run was described wrongly. The message lists every fault, one a line."""

    exit_code = 2  # the user's mistake


class DataError(DistftError):
    """Text, labels, or token shards are missing, damaged, or of another kind."""

    exit_code = 2


class StorageError(DistftError):
    """A file cannot be written or read back: the disk is full, or bytes are missing or damaged."""


class UnreachableError(StorageError):
    """A place for files cannot be used now: network, service, credentials, rights.

    Whether the files there are whole is not known, so nothing may be taken for damaged or absent by it.
    """


class CheckpointError(DistftError):
    """A checkpoint is missing, half-written, damaged, or does not fit this run."""

    exit_code = 2


class SupersededError(CheckpointError):
    """Another start of the same run has begun to write its checkpoints: this one must not."""


class TrainingError(DistftError):
    """The run itself failed."""


class Preempted(DistftError):
    """The run was asked to stop, and has saved its state; starting it again goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Resized(Preempted):
    """As `Preempted`, to go on at once: with another number of ranks, or on other nodes."""


class LaunchError(DistftError):
    """Workers could not be placed, started, or kept alive."""


class Mistakes:
    """Gathers the user's mistakes of steps that do not need each other, so that all are told at once."""

    def __init__(self) -> None:
        self._found: list[DistftError] = []

    @contextmanager
    def gather(self) -> Iterator[None]:
        """A mistake of the user's within the block ends the block, and is kept; anything else goes on up."""
        try:
            yield
        except DistftError as error:
            if error.exit_code != ConfigError.exit_code:
                raise
            self._found.append(error)

    def raise_if_any(self) -> None:
        """Raise what was found: one error, of the kind of the first, that says each thing once."""
        if self._found:
            said = dict.fromkeys(str(error) for error in self._found)
            raise type(self._found[0])("\n".join(said)) from self._found[0]
