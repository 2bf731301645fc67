"""Committed checkpoints of ours: find them, read them, check them."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from distft import storage
from distft.checkpoint.fragments import Interval, cover
from distft.checkpoint.manifest import MANIFEST, Manifest
from distft.checkpoint.rank_file import Place, read_header, read_values
from distft.collectives import Collectives, together
from distft.errors import CheckpointError, DataError, StorageError, UnreachableError
from distft.tokenizer import Tokenizer

STEP = "step_"
_THREADS = min(4, os.cpu_count() or 1)
BESIDE = "../"  # how a file of another directory of the same store is named


class Checkpoint:
    """A committed checkpoint of ours: its manifest, and its state by name and interval."""

    format = "distft"

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._headers: dict[int, dict[tuple[str, str], Place]] = {}
        self._held: dict[str, list[Interval]] = {}
        for number, record in enumerate(manifest.files):
            for parameter, (start, stop) in record.intervals.items():
                self._held.setdefault(parameter, []).append(Interval(start, stop, number))

    @classmethod
    def open(cls, path: str) -> "Checkpoint":
        """The checkpoint at `path`. Raises `CheckpointError` where none was committed."""
        where = storage.join(path, MANIFEST)
        try:
            data = storage.read_bytes(where)
        except FileNotFoundError:
            raise CheckpointError(
                f"{path} holds no {MANIFEST}, so no checkpoint was committed there; "
                f"give a run's directory, or one of its checkpoints/{STEP}*."
            ) from None
        return cls(path, Manifest.from_bytes(data, where))

    @property
    def step(self) -> int:
        return self.manifest.progress.step

    def file_path(self, number: int) -> str:
        """Where a file of the manifest lies: here, or beside this directory."""
        name = self.manifest.files[number].name
        if not name.startswith(BESIDE):
            return storage.join(self.path, name)
        return storage.join(storage.parent(self.path), name.removeprefix(BESIDE))

    def has(self, parameter: str, state: str) -> bool:
        record = self.manifest.parameters.get(parameter)
        return record is not None and state in record.states

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        record = self.manifest.parameters.get(parameter)
        return None if record is None else record.shape

    def updates(self, parameter: str) -> int:
        record = self.manifest.parameters.get(parameter)
        return 0 if record is None else record.updates

    def read(self, parameter: str, state: str, start: int, stop: int) -> torch.Tensor:
        try:
            pieces = cover(start, stop, self._held.get(parameter, ()))
        except ValueError as gap:
            raise CheckpointError(f"{self.path} lacks element {gap} of {state} of {parameter!r}.") from None
        values = [self._read_piece(parameter, state, piece) for piece in pieces]
        return values[0] if len(values) == 1 else torch.cat(values)

    def _read_piece(self, parameter: str, state: str, piece: Interval) -> torch.Tensor:
        path = self.file_path(piece.holder)
        if piece.holder not in self._headers:
            self._headers[piece.holder] = read_header(path)
        place = self._headers[piece.holder].get((parameter, state))
        if place is None:
            raise CheckpointError(f"{path} has no {state} of {parameter!r}, which its manifest promises.")
        return read_values(path, place, piece.start, piece.stop)

    def faults(self, numbers: Sequence[int] | None = None) -> list[str]:
        """What is wrong with the files of these numbers: absent, of another size or other bytes.

        Without numbers all are looked at, and the tokenizer. Raises `UnreachableError` where that cannot be
        found out.
        """
        chosen = range(len(self.manifest.files)) if numbers is None else numbers
        with ThreadPoolExecutor(_THREADS) as threads:  # reading and hashing leave the interpreter free
            found = [fault for fault in threads.map(self._fault, chosen) if fault]
        return found if numbers is not None else [*found, *self.tokenizer_faults()]

    def tokenizer_faults(self) -> list[str]:
        """What is wrong with the tokenizer that lies beside the manifest: absent, or with other ids."""
        record = self.manifest.tokenizer
        if record is None or record.file is None:
            return []
        where = storage.join(self.path, record.file)
        try:
            found = Tokenizer(storage.read_bytes(where)).fingerprint
        except FileNotFoundError:
            fault = f"{where} is missing"
        except DataError as error:
            fault = f"{where} is damaged ({error})"
        else:
            if found == record.fingerprint:
                return []
            fault = f"{where} is damaged: its fingerprint is {found}, the manifest's {record.fingerprint}"
        return [f"{fault}; another commit of the run has it: copy it from there."]

    def _fault(self, number: int) -> str:
        record = self.manifest.files[number]
        try:
            storage.verify(self.file_path(number), checksum=record.checksum, num_bytes=record.num_bytes)
        except UnreachableError:
            raise
        except StorageError as error:
            hint = ""
            if record.name.startswith(BESIDE):
                hint = " A checkpoint with frozen weights is copied with `distft checkpoint convert`."
            return f"{error}{hint}"
        return ""

    def verify(self, collectives: Collectives) -> None:
        """Check every byte, each file on one rank; fails on all ranks together, naming each damaged file."""
        with together(collectives, CheckpointError):
            mine = range(collectives.rank, len(self.manifest.files), collectives.world_size)
            found = self.faults(mine)
            if found:
                raise CheckpointError("\n".join(found))


def committed_steps(root: str) -> list[int]:
    """Steps with a manifest, ascending; a directory without one is a draft."""
    return [s for s in steps_in(root) if storage.exists(storage.join(root, f"{STEP}{s:08d}", MANIFEST))]


def steps_in(root: str) -> list[int]:
    """Steps that have a directory, ascending, committed or not."""
    names = (name.removeprefix(STEP) for name in storage.list_names(root) if name.startswith(STEP))
    return sorted(int(name) for name in names if name.isdecimal())


def uncommitted(root: str, *, after: int = -1) -> list[str]:
    """A sentence on each step later than `after` that has a directory and no manifest."""
    committed = set(committed_steps(root))
    return [
        f"{storage.join(root, f'{STEP}{step:08d}')} is uncommitted: it has no {MANIFEST}."
        for step in steps_in(root)
        if step > after and step not in committed
    ]


def looks_like_draft(path: str, names: Iterable[str]) -> bool:
    """Whether a directory with these names is a step of ours, or holds a rank's file."""
    own_name = path.rstrip("/").rpartition("/")[2]
    is_step = own_name.startswith(STEP) and own_name.removeprefix(STEP).isdecimal()
    return is_step or any(name.startswith("rank_") and name.endswith(".safetensors") for name in names)


def find_checkpoint(path: str) -> Checkpoint:
    """The checkpoint that `path` means: itself, or the newest of a run or of a `checkpoints` directory."""
    if storage.exists(storage.join(path, MANIFEST)):
        return Checkpoint.open(path)
    for root in (storage.join(path, "checkpoints"), path):
        steps = committed_steps(root)
        if steps:
            return Checkpoint.open(storage.join(root, f"{STEP}{steps[-1]:08d}"))
    raise CheckpointError(
        f"No committed checkpoint at {path} (looked for {MANIFEST}, {STEP}*/ and checkpoints/{STEP}*/)."
        f"{steps_beside(path)}"
    )


def steps_beside(path: str) -> str:
    """A sentence on the commits that lie where `path` was looked for; empty where there are none."""
    others = [f"{STEP}{step:08d}" for step in committed_steps(storage.parent(path))]
    return f" Beside it there are {', '.join(others)}." if others else ""
