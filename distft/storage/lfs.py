"""Git-LFS pointers: the few lines of text that a clone without git-lfs has in place of a large file."""

from distft.errors import DataError, DistftError
from distft.storage.files import open_read
from distft.storage.paths import AnyPath

POINTER_HEAD_BYTES = 64  # of a file's start, enough to recognize a pointer
# The second is the name that git-lfs had before its first release; its reader still accepts it.
_POINTER_STARTS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that starts with `head` is a git-LFS pointer; needs `POINTER_HEAD_BYTES` bytes."""
    return bytes(head[:POINTER_HEAD_BYTES]).startswith(_POINTER_STARTS)


def check_not_lfs_pointer(
    path: AnyPath, head: bytes | None = None, *, error: type[DistftError] = DataError
) -> None:
    """Raise `error` if the file at `path` is a git-LFS pointer instead of the file that it stands for.

    `head` is the start of the file, if the caller has read it; else it is read here (`FileNotFoundError`).
    """
    if head is None:
        with open_read(path) as file:
            head = file.read(POINTER_HEAD_BYTES)
    if is_lfs_pointer(head):
        raise error(f"{path} is a git-LFS pointer, not the file: run `git lfs pull` there.")
