"""What tells a checkpoint that is not read here from a damaged one."""

from distft.errors import CheckpointError


class UnreadError(CheckpointError):
    """No checkpoint, or one of a kind that is not read here; says nothing of damage."""
