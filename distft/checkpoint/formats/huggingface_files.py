"""Finds the tensors in the safetensors files of a transformers model directory, and damaged files."""

import json
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distft import storage
from distft.checkpoint.manifest import PlainName
from distft.checkpoint.safetensors_header import AbsentFileError, TensorLocation, read_safetensors_header
from distft.errors import CheckpointError, UnsupportedFormatError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_WEIGHT_MAP = TypeAdapter(dict[str, PlainName])  # tensor -> file


@dataclass(slots=True)
class TensorScan:
    """The tensors in a model directory, and the damage of its files."""

    locations: dict[str, TensorLocation] = field(default_factory=dict)  # by tensor name
    unreadable: set[str] = field(default_factory=set)  # tensors in damaged or missing files
    is_weights_file_unreadable: bool = False  # the only file is damaged, so its tensors are unknown
    damage: list[str] = field(default_factory=list)
    is_incomplete: bool = False  # a file is not there at all

    def is_reported(self, name: str) -> bool:
        """Whether `damage` already explains why this tensor is missing."""
        return self.is_weights_file_unreadable or name in self.unreadable


def scan_tensors(path: str) -> TensorScan:
    """Read the headers of all files in a model directory.

    Raises `CheckpointError` if there is neither a weights file nor an index, and with all damage if a file
    is missing or a git-LFS pointer.
    """
    scan = TensorScan()
    if storage.exists(storage.join(path, WEIGHTS_FILE)):
        _add_file(scan, storage.join(path, WEIGHTS_FILE), None)
        _require_files(scan)
        return scan
    index = storage.join(path, INDEX_FILE)
    if not storage.exists(index):
        has_other_format = any(name.endswith(".bin") for name in storage.list_names(path))
        raise (UnsupportedFormatError if has_other_format else CheckpointError)(
            f"{path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}. If it has weights in another format, such "
            "as pytorch_model.bin, save them as safetensors first, with save_pretrained of transformers."
        )
    indexed = _read_index(index)
    for file in sorted(indexed):
        _add_file(scan, storage.join(path, file), indexed[file])
    _require_files(scan)
    return scan


def _require_files(scan: TensorScan) -> None:
    if scan.is_incomplete:
        raise CheckpointError("\n".join(scan.damage))


def _add_file(scan: TensorScan, path: str, indexed: set[str] | None) -> None:
    """Add the tensors of one file; `indexed` are those that the index lists, None without an index."""
    try:
        header = read_safetensors_header(path)
    except CheckpointError as error:
        scan.damage.append(str(error))
        scan.is_incomplete |= isinstance(error, AbsentFileError)
        scan.is_weights_file_unreadable |= indexed is None
        scan.unreadable |= indexed or set()
        return
    num_bytes, end = storage.size(path), max((location.stop for location in header.values()), default=0)
    if num_bytes < end:
        scan.damage.append(f"{path} is cut short: it has {num_bytes:,} of {end:,} bytes. Download it again.")
    for name, location in header.items():
        if location.stop > num_bytes:
            scan.unreadable.add(name)
        elif indexed is None or name in indexed or name not in scan.locations:
            scan.locations[name] = location


def _read_index(path: str) -> dict[str, set[str]]:
    """The names of each file's tensors, from the index, which can name files in its own directory only."""
    raw = read_json(path)
    if not isinstance(raw.get("weight_map"), dict):
        raise CheckpointError(f"{path} has no weight_map: download it again.")
    try:
        weight_map = _WEIGHT_MAP.validate_python(raw["weight_map"])
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        raise CheckpointError(
            f"{path} says that {found['loc'][0]!r} is in {str(found['input'])[:200]!r}, which is not the "
            "name of a file beside it, and no other file is read. Download it again."
        ) from None
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, set()).add(name)
    return files


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` if there is none."""
    try:
        data = storage.read_bytes(path)
        storage.check_not_lfs_pointer(path, data, error=CheckpointError)
        raw = json.loads(data)
    except (FileNotFoundError, IsADirectoryError):
        raise CheckpointError(f"{path} is missing: the directory is not a model of transformers.") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is JSON, but not an object: download it again.")
    return raw
