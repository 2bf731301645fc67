"""Which files a corpus consists of.

A path names one file, a directory, or a glob.

- A directory is searched recursively for files with the endings of the corpus (in any case, optionally
  followed by `.gz` or `.zst`). Links to files are followed. A link to a directory is followed if it leads
  outside of what is searched, so that nothing is read twice and no cycle is followed.
- A glob takes the files that it matches, with its ending in any case. One that leaves the ending open
  (`data/*`) takes only the endings of the corpus, and searches the directories that it matches.
- A file that is named by itself is read whatever its ending.

Empty files never count; hidden files and directories, and what other programs leave beside data (`_SUCCESS`,
`_metadata`, `dataset_infos.json`, lists of checksums), count only if they are named themselves.
"""

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from distft import storage
from distft.data.compressed import compression_of, without_compression
from distft.errors import DataError
from distft.storage.errors import errors_as_unreachable
from distft.storage.lfs import check_not_lfs_pointer
from distft.storage.remote import s3_options

_MARKERS = re.compile(
    r"_success|_metadata|_common_metadata|_started_\S*|_committed_\S*"  # Spark, Databricks
    r"|dataset_infos?\.json"  # Hugging Face's descriptions of a data set
    r"|thumbs\.db|desktop\.ini"
    r"|(md5|sha1|sha224|sha256|sha384|sha512)(sums?)?(\.txt)?|checksums?(\.txt)?",
    re.IGNORECASE,
)
_MARKER_DIRECTORIES = frozenset({"_delta_log", "_temporary", "_spark_metadata", "__macosx", "__pycache__"})
_ENDING_OF_GLOB = re.compile(r"\.[^*?\[\]/.]+(\.(gz|zst))?$", re.IGNORECASE)
_GLOB = re.compile(r"[*?\[]")
_PART_OF_SET = re.compile(r"(.*?)(\d{5})-of-(\d{5})(?!\d)(.*)")
_BROKEN_LINK = frozenset({errno.ENOENT, errno.ELOOP})
_MOST_OPENED = 1000
_MOST_ENDING = 12  # characters
_MOST_POINTER_BYTES = 1024  # a git-LFS pointer has about 130


@dataclass(frozen=True, slots=True)
class SourceFile:
    url: str  # a local path, or a URL that fsspec opens
    size: int  # bytes on disk
    version: str  # ETag or modification time, "" if the storage has neither

    @property
    def is_compressed(self) -> bool:
        return bool(compression_of(self.url))


@dataclass(slots=True)
class Listing:
    """The files that are read, and how many others were passed over."""

    files: dict[str, SourceFile] = field(default_factory=dict)  # by URL, in the order of reading
    passed_over: Counter[str] = field(default_factory=Counter)  # by ending, or by reason

    def describe(self) -> list[str]:
        """Lines for a person: what is taken and what is passed over, by ending; sets with missing parts."""
        taken = Counter(ending_of(file.url) for file in self.files.values())
        num_bytes = sum(file.size for file in self.files.values())
        lines = [f"Reading {counted(taken)} ({num_bytes:,} bytes)."]
        if self.passed_over:
            lines[0] += f" Passed over: {counted(self.passed_over)}."
        return lines + _incomplete_sets(list(self.files))


@dataclass(frozen=True, slots=True)
class Entry:
    """A file that a path names, before it is known whether it is read."""

    file: SourceFile
    not_counted: str = ""  # why it is no data whatever its ending: "hidden", a marker, ...
    is_broken: bool = False  # a link to a file that does not exist


@dataclass(frozen=True, slots=True)
class PathEntries:
    """All files that one path names, sorted."""

    entries: list[Entry]
    is_directory: bool
    takes_any: bool  # of whatever ending: the path is a file, or a glob with an ending


def ending_of(name: str) -> str:
    """The ending of a name in lower case, without that of a compression; "without ending" if it has none."""
    last = without_compression(name).rpartition("/")[2].lower()
    ending = last.rpartition(".")[2]
    is_ending = "." in last.lstrip(".") and ending.isalnum() and len(ending) <= _MOST_ENDING
    return f".{ending}" if is_ending else "without ending"


def counted(numbers: Counter[str]) -> str:
    """`3 .jsonl, 1 .md`, the most first."""
    return ", ".join(f"{number:,} {name}" for name, number in numbers.most_common()) or "no file"


def list_files(patterns: tuple[str, ...], suffixes: tuple[str, ...]) -> Listing:
    """The files of a corpus: each once, in the order of the patterns, sorted by name within each.

    Raises `DataError` with every pattern that names nothing to read, and every file that is no data.
    """
    listing = Listing()
    problems: list[str] = []
    for pattern in patterns:
        try:
            named = find_entries(pattern)
        except DataError as error:
            problems.append(str(error))
            continue
        found = named.entries
        taken, passed_over = _select(found, None if named.takes_any else suffixes)
        if broken := [entry.file.url for entry in found if entry.is_broken and entry.file in taken]:
            problems.append(
                f"{broken[0]} is a link to a file that does not exist; {len(broken):,} such in {pattern}: "
                "download the data again, or remove the links."
            )
            continue
        if not taken:
            problems.append(_nothing_to_read(pattern, found, passed_over, suffixes))
            continue
        new = [file for file in taken if file.url not in listing.files]
        listing.files |= {file.url: file for file in new}
        listing.passed_over += passed_over
        problems += _pointers(new)
    if problems:
        raise DataError("\n".join(problems))
    return listing


def _select(found: list[Entry], suffixes: tuple[str, ...] | None) -> tuple[list[SourceFile], Counter[str]]:
    """The files to read (of any ending for None), and what is passed over."""
    taken: list[SourceFile] = []
    passed_over: Counter[str] = Counter()
    endings = None if suffixes is None else tuple(suffix.lower() for suffix in suffixes)
    for entry in found:
        if entry.not_counted:
            passed_over[entry.not_counted] += 1
        elif endings is not None and not without_compression(entry.file.url).lower().endswith(endings):
            passed_over[ending_of(entry.file.url)] += 1
        elif not entry.file.size and not entry.is_broken:
            passed_over["empty"] += 1
        else:
            taken.append(entry.file)
    return taken, passed_over


def _nothing_to_read(
    pattern: str, found: list[Entry], passed_over: Counter[str], suffixes: tuple[str, ...]
) -> str:
    if len(found) == 1 and passed_over["empty"] == 1:
        return f"corpus path {pattern} has nothing to read: it is empty."
    if found:
        return (
            f"corpus path {pattern} has nothing to read: no file in it ends in {', '.join(suffixes)} (or one "
            f"of these with .gz or .zst) and has text; it has {counted(passed_over)}. To read others as they "
            f"are, name the files, or a glob with their ending such as {_example_glob(pattern, passed_over)}."
        )
    local = storage.local_path(pattern)
    if _GLOB.search(pattern):
        return f"corpus path {pattern} matches no file."
    is_there = local is not None and local.is_dir()
    return f"corpus path {pattern} {'is a directory without files' if is_there else 'does not exist'}."


def _example_glob(pattern: str, passed_over: Counter[str]) -> str:
    ending = next((name for name, _ in passed_over.most_common() if name.startswith(".")), ".ending")
    return f"'{pattern.rstrip('/')}/**/*{ending}'" if not _GLOB.search(pattern) else f"'*{ending}'"


def _pointers(files: list[SourceFile]) -> list[str]:
    """A message for each git-LFS pointer among `files`; only local ones are opened."""
    problems = []
    small = (file for file in files if file.size <= _MOST_POINTER_BYTES and not storage.is_url(file.url))
    for file in islice(small, _MOST_OPENED):  # others are found when they are read
        try:
            check_not_lfs_pointer(file.url)
        except DataError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{file.url} cannot be read: {error.strerror or error}.")
    return problems


def find_entries(pattern: str) -> PathEntries:
    """The files that a file name, directory or glob names.

    Raises `DataError` if it cannot be listed, and `UnreachableError` about a store.
    """
    try:
        if not storage.is_url(pattern):
            return _find_entries(pattern, is_local=True)
        with errors_as_unreachable(pattern, "listing"):
            return _find_entries(pattern, is_local=False)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"corpus path {pattern} cannot be read: {error}.") from error


def _find_entries(pattern: str, *, is_local: bool) -> PathEntries:
    from fsspec.core import url_to_fs  # 0.1 s, which processes that only read files save

    options = s3_options() if pattern.startswith(("s3://", "s3a://")) else {}
    # Without a cache: the corpus is listed again after the work, to see whether it is still the same.
    filesystem, path = url_to_fs(pattern, use_listings_cache=False, **options)
    if filesystem.isfile(path):
        info = filesystem.info(path)
        file = _source_file(path if is_local else filesystem.unstrip_protocol(path), info)
        return PathEntries([Entry(file)], is_directory=False, takes_any=True)
    is_directory = filesystem.isdir(path)
    if is_local and not is_directory and Path(path).exists():
        raise ValueError("it is no regular file, but a pipe, device or socket: copy it to a file")
    wildcard = None if is_directory else _GLOB.search(path)
    ending = _ENDING_OF_GLOB.search(path) if wildcard else None
    takes_any = ending is not None
    if ending:  # as in directories
        path = path[: ending.start()] + _in_any_case(ending[0])
    top = path[: wildcard.start()].rpartition("/")[0] if wildcard else path
    if not is_local:
        found = list(_remote_files(filesystem, path, top))
    elif is_directory:
        found = list(_walk(path))
    else:
        found = list(_matches(filesystem.glob(path), top, takes_any))
    found.sort(key=lambda entry: entry.file.url)
    return PathEntries(found, is_directory, takes_any)


def _in_any_case(ending: str) -> str:
    """A glob for an ending in any case: `.[jJ][sS]` for `.js`."""
    return "".join(f"[{c.lower()}{c.upper()}]" if c.isascii() and c.isalpha() else c for c in ending)


def _remote_files(filesystem: Any, path: str, top: str) -> Iterator[Entry]:
    """The files below a directory, or that a glob matches, in a file system of fsspec."""
    find = filesystem.find if path == top else filesystem.glob
    for name, info in find(path, detail=True).items():
        if info["type"] == "file" and not name.endswith("/"):  # some stores list directories as empty objects
            reason = next(filter(None, map(_not_counted, name[len(top) :].strip("/").split("/"))), "")
            yield Entry(_source_file(filesystem.unstrip_protocol(name), info), reason)


def _matches(paths: list[str], top: str, takes_any: bool) -> Iterator[Entry]:
    """What a glob matched: files, and the files below a directory unless the glob asks for an ending."""
    found: dict[str, Entry] = {}
    for path in paths:
        reason = next(filter(None, map(_not_counted, path[len(top) :].strip("/").split("/"))), "")
        try:
            status = os.stat(path)  # noqa: PTH116 - of what a link points to
        except OSError as error:
            if error.errno not in _BROKEN_LINK:
                raise
            found[path] = Entry(SourceFile(path, 0, ""), reason, is_broken=True)
            continue
        if not stat.S_ISDIR(status.st_mode):
            found[path] = Entry(_of_status(path, status), reason or _special(status))
        elif not takes_any and not reason:
            found |= {entry.file.url: entry for entry in _walk(path)}
        else:
            found[path] = Entry(SourceFile(path, 0, ""), reason or "directory")
    yield from found.values()


def _walk(top: str) -> Iterator[Entry]:
    """Every file below a local directory; hidden directories and directory links back are one entry each."""
    searched = [os.path.realpath(top)]
    pending = [top]
    while pending:
        directory = pending.pop()
        with os.scandir(directory) as scan:
            found = sorted(scan, key=lambda entry: entry.name)
        for entry in found:
            path = f"{directory.rstrip('/')}/{entry.name}"
            reason = _not_counted(entry.name)
            if _is_directory(entry):
                if not reason and entry.is_symlink():
                    real = os.path.realpath(path)
                    reason = "directory link" if any(_overlap(real, other) for other in searched) else ""
                    searched.append(real)
                if reason:
                    yield Entry(SourceFile(path, 0, ""), reason)
                else:
                    pending.append(path)
                continue
            try:
                status = entry.stat()
            except OSError as error:
                if error.errno not in _BROKEN_LINK:
                    raise
                yield Entry(SourceFile(path, 0, ""), reason, is_broken=True)
                continue
            yield Entry(_of_status(path, status), reason or _special(status))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _overlap(one: str, other: str) -> bool:
    """Whether one of two directories is the other, or below it."""
    return os.path.commonpath([one, other]) in {one, other}


def _not_counted(name: str) -> str:
    """Why a file or directory of this name is no data; "" if it may be."""
    if name.startswith("."):
        return "hidden"
    if name.lower() in _MARKER_DIRECTORIES:
        return name
    return name if _MARKERS.fullmatch(name) or _MARKERS.fullmatch(without_compression(name)) else ""


def _special(status: os.stat_result) -> str:
    return "" if stat.S_ISREG(status.st_mode) else "special file"


def _of_status(path: str, status: os.stat_result) -> SourceFile:
    return SourceFile(path, status.st_size, str(status.st_mtime))


def _source_file(url: str, info: dict[str, Any]) -> SourceFile:
    keys = ("ETag", "etag", "mtime", "LastModified", "updated")
    return SourceFile(url, info["size"], str(next((info[key] for key in keys if key in info), "")))


def _incomplete_sets(urls: list[str]) -> list[str]:
    """A line for each set of files named `...-00001-of-00004...` of which some are not there."""
    sets: dict[tuple[str, str, str], set[int]] = {}
    for url in urls:
        if match := _PART_OF_SET.fullmatch(url):
            before, number, total, after = match.groups()
            sets.setdefault((before, total, after), set()).add(int(number))
    messages = []
    for (before, total, after), numbers in sets.items():
        first = 0 if 0 in numbers else 1
        missing = (number for number in range(first, first + int(total)) if number not in numbers)
        num_missing = int(total) - len(numbers)
        if num_missing > 0:
            shown = ", ".join(f"{number:05}" for number in islice(missing, 5)) + ", ..." * (num_missing > 5)
            named = f"{before}*-of-{total}{after}"
            messages.append(f"{num_missing:,} of the {int(total):,} files {named} are missing: {shown}.")
    return messages
