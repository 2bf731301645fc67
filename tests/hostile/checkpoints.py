"""What the tests of hostile checkpoints share."""

import os
from collections.abc import Callable
from pathlib import Path

from hostile.guard import Guard, Outcome

READ = "hostile.readers:read_checkpoint"
SECRET = "the content of another file"

Build = Callable[[Path], None]  # fills a directory, or makes a path something
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
NO_FILES: dict[str, Build] = {  # what can be in place of a file
    "a_pipe": os.mkfifo,
    "without_end": lambda path: path.symlink_to("/dev/zero"),
    "a_directory": Path.mkdir,
}


def read(guard: Guard, folder: Path) -> Outcome:
    """Read the checkpoint in `folder`; nothing of the file `secret` beside it may be told."""
    (folder.parent / "secret").write_text(SECRET)
    outcome = guard.run(READ, str(folder), directories=[folder])
    assert SECRET not in outcome.message + repr(outcome.returned) + outcome.output
    return outcome


def read_hostile(guard: Guard, folder: Path, build: Build) -> Outcome:
    """Make `folder`, fill it by `build` and read it, which must take little memory and time."""
    folder.mkdir()
    build(folder)
    outcome = read(guard, folder)
    outcome.check()
    assert outcome.added_mb < 250
    assert outcome.seconds < 10
    return outcome
