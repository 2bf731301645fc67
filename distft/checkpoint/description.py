"""Content and statistics of a checkpoint, as plain data and as a table."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from distft import storage
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.sources import CheckpointSource, num_state_bytes, read_chunks, stored_states
from distft.config import redact


@dataclass(frozen=True, slots=True)
class StateStatistics:
    """Statistics of one state of one parameter, over its finite elements."""

    mean: float
    std: float
    smallest: float
    largest: float
    num_not_finite: int


def state_statistics(
    source: CheckpointSource,
    name: str,
    state: str = WEIGHT,
    on_progress: Callable[[int], None] | None = None,
) -> StateStatistics:
    """Mean, standard deviation and extremes of a state; NaN if it has no finite element."""
    count, total, squares, num_not_finite = 0, 0.0, 0.0, 0
    smallest, largest = math.inf, -math.inf
    for _, values in read_chunks(source, name, state, on_progress):
        finite = values.double()[torch.isfinite(values)]
        num_not_finite += values.numel() - finite.numel()
        if finite.numel():
            count += finite.numel()
            total += float(finite.sum())
            squares += float(finite.square().sum())
            smallest, largest = min(smallest, float(finite.min())), max(largest, float(finite.max()))
    if not count:
        return StateStatistics(math.nan, math.nan, math.nan, math.nan, num_not_finite)
    mean = total / count
    std = math.sqrt(max(squares / count - mean**2, 0.0))
    return StateStatistics(mean, std, smallest, largest, num_not_finite)


def describe(
    source: CheckpointSource, *, statistics: bool, on_progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Step, counts, files and parameters as JSON values; with `statistics`, reads every state."""
    manifest = source.manifest
    return {
        "path": redact(source.path),
        "format": source.format,
        "run_id": manifest.run_id,
        **manifest.progress.model_dump(mode="json"),
        "num_parameters": sum(prod(p.shape) for p in manifest.parameters.values() if not p.is_buffer),
        "num_trainable": sum(prod(p.shape) for p in manifest.parameters.values() if p.trainable),
        "num_bytes": num_state_bytes(source),
        "written_by": redact(manifest.written_by),
        "label_names": manifest.label_names,
        "tokenizer": _describe_tokenizer(source),
        "probe": None if manifest.probe is None else manifest.probe.model_dump(mode="json"),
        "tied": manifest.tied,
        "groups": [{"num_parameters": len(group.parameters), **group.settings} for group in manifest.groups],
        "base": None if manifest.base is None else redact(manifest.base.path),
        "files": _describe_files(source),
        "parameters": {
            name: _describe_parameter(source, name, statistics, on_progress) for name in manifest.parameters
        },
    }


def _describe_files(source: CheckpointSource) -> list[dict[str, Any]]:
    if not isinstance(source, Checkpoint):  # the manifest of a foreign format lists no files
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


def _describe_tokenizer(source: CheckpointSource) -> dict[str, Any] | None:
    record = source.manifest.tokenizer
    if record is None:
        return None
    is_missing = record.file is not None and not storage.exists(storage.join(source.path, record.file))
    return {**record.model_dump(mode="json"), "is_missing": is_missing}


def _describe_parameter(
    source: CheckpointSource, name: str, with_statistics: bool, on_progress: Callable[[int], None] | None
) -> dict[str, Any]:
    record = source.manifest.parameters[name]
    states = {}
    for state in stored_states(source, name):
        states[state] = record.states[state].model_dump(mode="json")
        if with_statistics:
            states[state] |= asdict(state_statistics(source, name, state, on_progress))
    return {
        "shape": list(record.shape),
        "trainable": record.trainable,
        "is_buffer": record.is_buffer,
        "updates": record.updates,
        "states": states,
    }


def description_table(description: dict[str, Any]) -> Group:
    """The result of `describe` as tables for a terminal."""
    return Group(_summary_table(description), Text(), _parameters_table(description["parameters"]))


def _summary_table(description: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
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
        value = description[name]
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    for name in ("written_by", "probe", "tied", "tokenizer"):
        if description[name]:
            shown = {key: value for key, value in description[name].items() if key != "is_missing"}
            pairs = ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)
            table.add_row(name, pairs + _missing_mark(description[name]))
    for file in description["files"]:
        text = f"{file['name']}, {file['num_bytes']:,} bytes, {file['checksum']}"
        table.add_row("file", text + _missing_mark(file))
    return table


def _parameters_table(parameters: dict[str, dict[str, Any]]) -> Table:
    has_statistics = any("mean" in s for p in parameters.values() for s in p["states"].values())
    table = Table(pad_edge=False)
    for column in ("parameter", "shape", "state", "dtype", "updates", "trainable"):
        table.add_column(column)
    for column in ("mean", "std", "smallest", "largest", "not finite") if has_statistics else ():
        table.add_column(column, justify="right")
    for name, parameter in parameters.items():
        for state, record in parameter["states"].items():
            shape = " x ".join(map(str, parameter["shape"])) or "1"
            trainable = "buffer" if parameter["is_buffer"] else "yes" if parameter["trainable"] else "no"
            cells = [name, shape, state, record["dtype"], str(parameter["updates"]), trainable]
            if has_statistics:
                cells += [f"{record[key]:.4g}" for key in ("mean", "std", "smallest", "largest")]
                cells.append(f"{record['num_not_finite']:,}")
            table.add_row(*map(Text, cells))
    return table


def _missing_mark(file: dict[str, Any]) -> str:
    return ", MISSING" if file.get("is_missing") else ""
