"""Which tensors lie in the safetensors of a model directory of transformers, and which got lost."""

import json
from dataclasses import dataclass, field
from typing import Any

from distft import storage
from distft.checkpoint.formats.safetensors_file import TensorPlace, read_header
from distft.checkpoint.unread import UnreadError
from distft.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(slots=True)
class FoundTensors:
    """Tensors by their name, and what is wrong with the files."""

    places: dict[str, TensorPlace] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)  # tensors that a fault of their file explains
    is_all_lost: bool = False
    faults: list[str] = field(default_factory=list)

    def explains(self, name: str) -> bool:
        """Whether a fault of a file says already that this tensor is not there."""
        return self.is_all_lost or name in self.lost


def find_tensors(path: str) -> FoundTensors:
    """The tensors of all files. Raises `CheckpointError` where there is neither a file nor an index."""
    if storage.exists(storage.join(path, WEIGHTS_FILE)):
        found = FoundTensors()
        _add_file(found, storage.join(path, WEIGHTS_FILE), None)
        return found
    index = storage.join(path, INDEX_FILE)
    if not storage.exists(index):
        is_other_kind = any(name.endswith(".bin") for name in storage.list_names(path))
        raise (UnreadError if is_other_kind else CheckpointError)(
            f"{path} has neither {WEIGHTS_FILE} nor {INDEX_FILE}. Weights in another form, such as "
            "pytorch_model.bin, must be saved as safetensors first: save_pretrained of transformers does so."
        )
    promised = _promised(index)
    found = FoundTensors()
    for file in sorted(promised):
        _add_file(found, storage.join(path, file), promised[file])
    return found


def _add_file(found: FoundTensors, where: str, promised: set[str] | None) -> None:
    """Add the tensors of one file, of which an index promises these; without an index, any."""
    try:
        header = read_header(where)
    except CheckpointError as error:
        found.faults.append(str(error))
        found.is_all_lost |= promised is None
        found.lost |= promised or set()
        return
    num_bytes, end = storage.size(where), max((place.stop for place in header.values()), default=0)
    if num_bytes < end:
        found.faults.append(f"{where} is cut short: it has {num_bytes:,} of {end:,} bytes. Fetch it again.")
    for name, place in header.items():
        if place.stop > num_bytes:
            found.lost.add(name)
        elif promised is None or name in promised or name not in found.places:
            found.places[name] = place


def _promised(index: str) -> dict[str, set[str]]:
    """Each file of an index with its tensors."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map: fetch it again.")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(str(file), set()).add(str(name))
    return files


def read_json(where: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError`."""
    try:
        raw = json.loads(storage.read_bytes(where))
    except FileNotFoundError:
        raise CheckpointError(f"{where} is missing: the directory is no model of transformers.") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON ({error}): fetch it again.") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where} is JSON, but no object with named values: fetch it again.")
    return raw
