"""The output of a tokenization: which files are its own, who may write it, and what is removed from it.

Its own are the files of a valid manifest of token shards with the sizes that it says, and the files with the
name of a work whose log is there. Nothing else is overwritten or removed.
"""

import contextlib
import json
import os
import re
import secrets
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from distft import storage
from distft.data.corpus_listing import SourceFile
from distft.data.shard_layout import MANIFEST
from distft.data.shard_manifest import ShardManifest, read_manifest
from distft.errors import ConfigError, DataError, StorageError
from distft.prepare.work_log import LOG, WorkHeader, WorkLog, open_log
from distft.storage import is_url, join, local_path
from distft.storage.local import TEMPORARY_MARK
from distft.tokenizer import Tokenizer
from distft.tokenizer.files import OWN_FILES as TOKENIZER_FILES
from distft.tokenizer.files import find_tokenizer_file

TRAIN, VALIDATION = "train", "validation"
CLAIM = "unfinished.claim"  # at a URL: which machine writes there
_DRAFT = re.compile(
    rf"({'|'.join(map(re.escape, (MANIFEST, *TOKENIZER_FILES)))}){re.escape(TEMPORARY_MARK)}[0-9a-f]{{8}}"
)
_OLD_LOG = "unfinished.json"  # of versions before 2


class Output:
    """The directory or URL that `distft tokenize` writes."""

    def __init__(self, path: str, staging: str | None) -> None:
        self.path = path
        self.is_remote = is_url(path)
        # Where files are until they are complete: in the output itself, if it is local.
        self.working = _staging(path, staging) if self.is_remote else Path(local_path(path) or path)

    def split(self, split: str) -> str:
        """Directory or URL of the shards of a split."""
        return join(self.path, split)

    def has_unfinished_work(self) -> bool:
        """Whether there is a log, or another machine's claim."""
        return (self.working / LOG).exists() or (self.is_remote and storage.exists(self._claim_path))

    def manifests(self) -> dict[str, ShardManifest]:
        """The committed shards by split. Raises `DataError` if a manifest is not of token shards."""
        found = {split: read_manifest(self.split(split)) for split in (TRAIN, VALIDATION)}
        return {split: manifest for split, manifest in found.items() if manifest is not None}

    @contextlib.contextmanager
    def open_log(self) -> Iterator[WorkLog]:
        """Have the output to this process alone. Raises `StorageError` if another one writes it."""
        if not self.is_remote and _is_old_log(self.working / _OLD_LOG):
            raise ConfigError(
                f"output={self.path} has unfinished work of an earlier version of distft: finish it with "
                f"that version, or remove {_OLD_LOG} and the shards without {MANIFEST} beside it."
            )
        if self.is_remote:
            _make_private(self.working)
        try:
            with open_log(self.working) as log:
                yield log
        finally:
            if self.is_remote:
                with contextlib.suppress(OSError):  # not empty: unfinished
                    self.working.rmdir()

    def begin(
        self, log: WorkLog, identity: dict[str, Any], *, older: WorkHeader | None, take_over: bool
    ) -> WorkHeader:
        """Log new work, which is to replace what is committed and what `older` work was to replace.

        Claims a URL for this machine (`take_over`: from another one).
        """
        replaces = older.replaces if older else {}
        for split, manifest in self.manifests().items():
            replaces[split] = replaces.get(split, {}) | {f.name: f.size_bytes for f in manifest.files}
        used = [name for sizes in replaces.values() for name in sizes]
        digests = (_digest(json.dumps([identity, number], sort_keys=True)) for number in range(1 << 20))
        header = WorkHeader(
            identity=identity,
            work=next(work for work in digests if not any(work in name for name in used)),
            claim=self._claim_content() if self.is_remote else "",
            replaces=replaces,
        )
        if self.is_remote:
            self._claim(header.claim, take_over=take_over)
        log.begin(header)
        return header

    def renew_claim(self, header: WorkHeader) -> None:
        """Claim the URL again if nobody does. Raises `StorageError` if another machine has taken it over."""
        if self.is_remote and self._read_claim() is None:
            self._claim(header.claim, take_over=False)
        self.require_claim(header)

    def require_claim(self, header: WorkHeader) -> None:
        """Raise `StorageError` if the URL is not claimed by this work."""
        if self.is_remote and self._read_claim() != header.claim:
            raise StorageError(
                f"output={self.path} was taken over{_who(self._read_claim())}, so that this work ends."
            )

    def remove_work(self, header: WorkHeader, *, is_complete: bool = False) -> None:
        """Remove the files with the work's name, and its directories if that leaves them empty.

        Files of a committed manifest stay. If the work `is_complete`, all shards are such files.
        """
        committed = {file.name for manifest in self.manifests().values() for file in manifest.files}
        kept = set() if self.is_remote else committed  # what was sent to a URL is not needed here
        for directory in (self.working, *(self.working / split for split in (TRAIN, VALIDATION))):
            for name in [*_names_of(directory, header.work), *_drafts_in(directory)]:
                if name not in kept:
                    (directory / name).unlink(missing_ok=True)
        for split in (TRAIN, VALIDATION) if self.is_remote and not is_complete else ():
            names = [name for name in storage.list_names(self.split(split)) if f"-{header.work}." in name]
            storage.remove_files(self.split(split), [name for name in names if name not in committed])
        for split in (TRAIN, VALIDATION):
            with contextlib.suppress(OSError):  # not empty, or not there
                (self.working / split).rmdir()
        if self.is_remote and self._read_claim() == header.claim:
            storage.remove(self._claim_path)

    def remove_replaced(self, header: WorkHeader, splits: Sequence[str]) -> None:
        """Remove the files of the shards that the work has replaced, if they have the size that they had.

        A split that is none of `splits` loses its manifest first, if that is still the replaced one.
        """
        for split, sizes in header.replaces.items():
            directory = self.split(split)
            manifest = read_manifest(directory)
            if split not in splits and manifest is not None:
                if {file.name for file in manifest.files} != sizes.keys():
                    continue
                storage.remove(join(directory, MANIFEST))
                manifest = None
            kept = {file.name for file in manifest.files} if manifest else set()
            found = storage.list_sizes(directory)
            storage.remove_files(
                directory, [name for name in sizes if name not in kept and found.get(name) == sizes[name]]
            )

    def check_tokenizer(self, tokenizer: Tokenizer, replaced: Iterable[ShardManifest]) -> None:
        """Raise `ConfigError` if a tokenizer is there that is neither this one nor that of shards there."""
        path = self._tokenizer_path()
        if path is None:
            foreign = [name for name in tokenizer.files() if storage.exists(join(self.path, name))]
            if foreign:
                raise ConfigError(
                    f"{join(self.path, foreign[0])} is of no tokenizer of shards here: choose another output."
                )
            return
        with contextlib.suppress(DataError):
            found = Tokenizer.load(path).fingerprint
            if found in {tokenizer.fingerprint, *(manifest.tokenizer_fingerprint for manifest in replaced)}:
                return
        raise ConfigError(f"{path} is another tokenizer, not that of shards here: choose another output.")

    def save_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Write the tokenizer beside the shards, unless it is there, in place of that of replaced ones."""
        path = self._tokenizer_path()
        old = None if path is None else Tokenizer.load(path)
        if old is not None and old.fingerprint == tokenizer.fingerprint:
            return
        files = tokenizer.files()
        for name, data in files.items():
            storage.commit_bytes(join(self.path, name), data)
        if old is not None:
            storage.remove_files(self.path, [name for name in old.files() if name not in files])

    def _tokenizer_path(self) -> str | None:
        """Of the tokenizer that is in the output."""
        name = find_tokenizer_file(self.path)
        return None if name is None else join(self.path, name)

    def check_inputs(
        self, files: Iterable[SourceFile], manifests: dict[str, ShardManifest], work: str = ""
    ) -> None:
        """Raise `ConfigError` if a file of the corpus is one that the work writes, replaces or removes."""
        own = [join(self.path, name) for name in (*TOKENIZER_FILES, LOG, CLAIM)]
        for split in (TRAIN, VALIDATION):
            names = [MANIFEST] if split in manifests else []
            names += [file.name for file in manifests[split].files] if split in manifests else []
            names += _names_of(self.working / split, work) if work and not self.is_remote else []
            own += [join(self.split(split), name) for name in names]
        identities = {identity for path in own if (identity := _identity(path))}
        for file in files:
            if _identity(file.url) in identities:
                raise ConfigError(
                    f"corpus file {file.url} is a part of output={self.path}, which this command writes: "
                    "choose an output outside of the corpus, or name the files of the corpus."
                )

    @property
    def _claim_path(self) -> str:
        return join(self.path, CLAIM)

    def _claim_content(self) -> str:
        holder = {"host": socket.gethostname(), "staging": str(self.working), "token": secrets.token_hex(8)}
        return json.dumps(holder)

    def _read_claim(self) -> str | None:
        try:
            return storage.read_bytes(self._claim_path).decode("utf-8", "replace")
        except FileNotFoundError:
            return None

    def _claim(self, content: str, *, take_over: bool) -> None:
        expected = storage.version(self._claim_path) if take_over else None
        if not storage.commit_unless_changed(
            self._claim_path, content.encode(), expected=expected, confirm=lambda: None
        ):
            raise StorageError(
                f"output={self.path} is being written{_who(self._read_claim())}: wait for it, or finish it "
                "there. If that machine is gone, --overwrite starts again."
            )


def _staging(url: str, staging: str | None) -> Path:
    parent = Path(staging or tempfile.gettempdir())
    return parent / f"distft-tokenize-{os.getuid()}-{_digest(url.rstrip('/'))}"


def _make_private(directory: Path) -> None:
    """Create a directory for this user alone. Raises `StorageError` if it is there and another user's."""
    storage.make_directory(directory.parent)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise StorageError(f"{directory} is not a directory of this user: set `staging` to another place.")


def _digest(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


def _names_of(directory: Path, work: str) -> list[str]:
    """Names of files in a directory that carry the name of a work."""
    return [path.name for path in directory.glob(f"*-{work}[.-]*") if path.is_file()] if work else []


def _drafts_in(directory: Path) -> list[str]:
    """What a killed process has left of a file that only the holder of the lock writes."""
    names = (path.name for path in directory.glob(f"*{TEMPORARY_MARK}*") if path.is_file())
    return [name for name in names if _DRAFT.fullmatch(name)]


def _identity(path: str) -> Any:
    """Equal for two names of one file, through links too; None if there is no file."""
    local = local_path(path)
    if local is None:
        return path
    try:
        found = local.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_old_log(path: Path) -> bool:
    try:
        return path.is_file() and "num_parts" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _who(claim: str | None) -> str:
    try:
        holder = json.loads(claim or "")
        return f" by host {holder['host']!s:.60} (staging {holder['staging']!s:.200})"
    except (ValueError, KeyError, TypeError):
        return " by another machine"
