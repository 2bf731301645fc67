"""Finds the tensors in the safetensors files of a transformers model directory, and damaged files."""

import json
from dataclasses import dataclass, field
from typing import Any

from distft import storage
from distft.checkpoint.formats.safetensors_file import TensorLocation, read_header
from distft.errors import CheckpointError, UnsupportedFormatError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(slots=True)
class TensorScan:
    """The tensors in a model directory, and the damage of its files."""

    locations: dict[str, TensorLocation] = field(default_factory=dict)  # by tensor name
    unreadable: set[str] = field(default_factory=set)  # tensors in damaged or missing files
    is_weights_file_unreadable: bool = False  # the only file is damaged, so its tensors are unknown
    damage: list[str] = field(default_factory=list)

    def is_reported(self, name: str) -> bool:
        """Whether `damage` already explains why this tensor is missing."""
        return self.is_weights_file_unreadable or name in self.unreadable


def scan_tensors(path: str) -> TensorScan:
    """Read the headers of all files in a model directory.

    Raises `CheckpointError` if there is neither a weights file nor an index.
    """
    if storage.exists(storage.join(path, WEIGHTS_FILE)):
        scan = TensorScan()
        _add_file(scan, storage.join(path, WEIGHTS_FILE), None)
        return scan
    index = storage.join(path, INDEX_FILE)
    if not storage.exists(index):
        has_other_format = any(name.endswith(".bin") for name in storage.list_names(path))
        raise (UnsupportedFormatError if has_other_format else CheckpointError)(
            f"{path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}. If it has weights in another format, such "
            "as pytorch_model.bin, save them as safetensors first, with save_pretrained of transformers."
        )
    indexed = _read_index(index)
    scan = TensorScan()
    for file in sorted(indexed):
        _add_file(scan, storage.join(path, file), indexed[file])
    return scan


def _add_file(scan: TensorScan, path: str, indexed: set[str] | None) -> None:
    """Add the tensors of one file; `indexed` are those that the index lists, None without an index."""
    try:
        header = read_header(path)
    except CheckpointError as error:
        scan.damage.append(str(error))
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
    """The names of each file's tensors, from the index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path} has no weight_map: download it again.")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(str(file), set()).add(str(name))
    return files


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` if there is none."""
    try:
        raw = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the directory is not a model of transformers.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): download it again.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is JSON, but not an object: download it again.")
    return raw
