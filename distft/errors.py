"""Everything distft raises on purpose.

DistftError
├── ConfigError        the run was described wrongly; raised before any GPU is touched
├── DataError          text, labels, or token shards are missing, damaged, or of another kind
├── StorageError       a file cannot be written or read back: full disk, missing or damaged bytes
├── CheckpointError    a checkpoint is missing, half-written, damaged, or does not fit this run
├── TrainingError      the run itself failed: non-finite losses in a row, a rank that hangs
├── Preempted          the run was asked to stop, and has saved its state
└── LaunchError        workers could not be placed, started, or kept alive
"""


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


class CheckpointError(DistftError):
    """A checkpoint is missing, half-written, damaged, or does not fit this run."""

    exit_code = 2


class TrainingError(DistftError):
    """The run itself failed."""


class Preempted(DistftError):
    """The run was asked to stop, and has saved its state; starting it again goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class LaunchError(DistftError):
    """Workers could not be placed, started, or kept alive."""
