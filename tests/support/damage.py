"""Damages files."""

from pathlib import Path


def flip_bit(file: Path, offset: int = -1) -> None:
    """Flip one bit of the byte at `offset`; a negative offset counts from the end, as in a list."""
    data = bytearray(file.read_bytes())
    data[offset] ^= 16
    file.write_bytes(data)


def rank_file(commit: Path, rank: int = 0) -> Path:
    """The file of a rank in a commit; its name carries that of the start that wrote it."""
    (file,) = commit.glob(f"rank_{rank:05d}*.safetensors")
    return file
