"""Files by path or URL: `runs/a/config.yaml`, `s3://bucket/runs`, `memory://test`.

Every file is written as a whole or not at all. Local paths use system calls, URLs use fsspec.
"""

from distft.storage.checksum import ChecksumWriter, checksum_of, checksum_of_bytes, verify
from distft.storage.errors import full_disk_as_storage_error
from distft.storage.files import (
    Writer,
    commit_bytes,
    copy,
    exists,
    is_directory,
    list_names,
    make_directory,
    open_read,
    open_write,
    read_bytes,
    read_into,
    read_range,
    read_view,
    remove,
    remove_temporary_files,
    remove_tree,
    size,
)
from distft.storage.paths import AnyPath, is_url, join, local_path, parent

__all__ = [
    "AnyPath",
    "ChecksumWriter",
    "Writer",
    "checksum_of",
    "checksum_of_bytes",
    "commit_bytes",
    "copy",
    "exists",
    "full_disk_as_storage_error",
    "is_directory",
    "is_url",
    "join",
    "list_names",
    "local_path",
    "make_directory",
    "open_read",
    "open_write",
    "parent",
    "read_bytes",
    "read_into",
    "read_range",
    "read_view",
    "remove",
    "remove_temporary_files",
    "remove_tree",
    "size",
    "verify",
]
