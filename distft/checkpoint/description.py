"""What is in a checkpoint, as plain data and as a table."""

from collections.abc import Callable
from dataclasses import asdict
from math import prod
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from distft import storage
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.comparison import num_bytes, states_of, statistics
from distft.checkpoint.sources import CheckpointSource


def describe(
    source: CheckpointSource, *, statistics: bool, on_progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Step, counts, layout and parameters, fit for JSON; with `statistics` every state is read."""
    manifest = source.manifest
    return {
        "path": source.path,
        "format": source.format,
        "run_id": manifest.run_id,
        **manifest.progress.model_dump(mode="json"),
        "num_parameters": sum(prod(p.shape) for p in manifest.parameters.values() if not p.is_buffer),
        "num_trainable": sum(prod(p.shape) for p in manifest.parameters.values() if p.trainable),
        "num_bytes": num_bytes(source),
        "written_by": manifest.written_by,
        "label_names": manifest.label_names,
        "tokenizer": _tokenizer(source),
        "probe": None if manifest.probe is None else manifest.probe.model_dump(mode="json"),
        "tied": manifest.tied,
        "groups": [{"num_parameters": len(group.parameters), **group.settings} for group in manifest.groups],
        "files": _files(source),
        "parameters": {
            name: _parameter(source, name, statistics, on_progress) for name in manifest.parameters
        },
    }


def _files(source: CheckpointSource) -> list[dict[str, Any]]:
    if not isinstance(source, Checkpoint):  # the manifest of a foreign format has none
        return []
    return [
        {
            "name": file.name,
            "num_bytes": file.num_bytes,
            "checksum": file.checksum,
            "is_missing": not storage.exists(source.file_path(number)),
        }
        for number, file in enumerate(source.manifest.files)
    ]


def _tokenizer(source: CheckpointSource) -> dict[str, Any] | None:
    record = source.manifest.tokenizer
    if record is None:
        return None
    is_missing = record.file is not None and not storage.exists(storage.join(source.path, record.file))
    return {**record.model_dump(mode="json"), "is_missing": is_missing}


def _parameter(
    source: CheckpointSource, name: str, with_statistics: bool, on_progress: Callable[[int], None] | None
) -> dict[str, Any]:
    record = source.manifest.parameters[name]
    states = {}
    for state in states_of(source, name):
        states[state] = record.states[state].model_dump(mode="json")
        if with_statistics:
            states[state] |= asdict(statistics(source, name, state, on_progress))
    return {
        "shape": list(record.shape),
        "trainable": record.trainable,
        "is_buffer": record.is_buffer,
        "updates": record.updates,
        "states": states,
    }


def description_table(found: dict[str, Any]) -> Group:
    """The same for people."""
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name in (
        "path",
        "format",
        "run_id",
        "step",
        "tokens_seen",
        "num_parameters",
        "num_trainable",
        "num_bytes",
    ):
        value = found[name]
        facts.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    for name in ("written_by", "probe", "tied", "tokenizer"):
        if found[name]:
            shown = {key: value for key, value in found[name].items() if key != "is_missing"}
            pairs = ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)
            facts.add_row(name, pairs + _mark(found[name]))
    for file in found["files"]:
        told = f"{file['name']}, {file['num_bytes']:,} bytes, {file['checksum']}"
        facts.add_row("file", told + _mark(file))
    has_statistics = any("mean" in s for p in found["parameters"].values() for s in p["states"].values())
    table = Table(pad_edge=False)
    for column in ("parameter", "shape", "state", "dtype", "updates", "learns"):
        table.add_column(column)
    for column in ("mean", "std", "smallest", "largest", "not finite") if has_statistics else ():
        table.add_column(column, justify="right")
    for name, parameter in found["parameters"].items():
        for state, record in parameter["states"].items():
            shape = " x ".join(map(str, parameter["shape"])) or "1"
            learns = "buffer" if parameter["is_buffer"] else "yes" if parameter["trainable"] else "no"
            cells = [name, shape, state, record["dtype"], str(parameter["updates"]), learns]
            if has_statistics:
                cells += [f"{record[key]:.4g}" for key in ("mean", "std", "smallest", "largest")]
                cells.append(f"{record['num_not_finite']:,}")
            table.add_row(*map(Text, cells))
    return Group(facts, Text(), table)


def _mark(file: dict[str, Any]) -> str:
    return ", MISSING" if file.get("is_missing") else ""
