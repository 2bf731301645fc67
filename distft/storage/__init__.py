"""Files by path or URL: `runs/a/config.yaml`, `s3://bucket/runs`, `memory://test`.

Everything that is written is committed as a whole. Local paths use the system directly; the rest is fsspec.
"""

from distft.storage.checksum import ChecksumWriter, checksum_of, checksum_of_bytes, verify
from distft.storage.disk import full_disk_explained
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
    remove_drafts,
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
    "full_disk_explained",
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
    "remove_drafts",
    "remove_tree",
    "size",
    "verify",
]
