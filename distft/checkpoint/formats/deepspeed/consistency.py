"""Compares what all files of one DeepSpeed checkpoint must have in common: mixed files look whole.

DeepSpeed's files do not say which save they are of. Files of another tag, or a copy of another rank's file,
are found by the update counts, the settings, the progress and the values that they contain.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distft.checkpoint.formats.deepspeed.contents import ModelFile
from distft.checkpoint.formats.deepspeed.files import DeepSpeedFiles
from distft.checkpoint.formats.deepspeed.segments import Segment, SegmentTable
from distft.checkpoint.formats.torch_file import OpaqueObject, StoredTensor
from distft.checkpoint.fragments import WEIGHT
from distft.errors import CheckpointError, ErrorCollector

# Entries that differ from rank to rank, and the script's own.
_OF_ONE_RANK = frozenset(
    ["module", "frozen_param_fragments", "group_paddings", "param_slice_mappings", "shared_params"]
)
_MAX_DEPTH = 40
_MAX_ENTRIES = 300_000  # of one file; 10,000 parameters of two dimensions have 30,000
_PLAIN = (bool, int, float, str, bytes, type(None))
_SHOWN_DIFFERENCES = 3
_COMPARED_SEGMENTS = 64  # of weights in two files: comparing all would take as long as reading them
_COMPARED_NUMEL = 1024
_SAMPLED_TENSORS = 8
_SAMPLED_NUMEL = 256
_DISTINCT_VALUES = 4  # with fewer, two ranks can have equal partitions, such as norms of ones
_Facts = dict[str, str]


def check_common(
    files: DeepSpeedFiles, models: Mapping[int, ModelFile], optimizers: Mapping[int, Mapping[str, Any]]
) -> None:
    """Raise `CheckpointError` with every file whose settings, counts or progress differ from another's."""
    errors = ErrorCollector()
    fields = ModelFile.model_fields
    facts = {files.model[rank]: _facts({n: getattr(m, n) for n in fields}) for rank, m in models.items()}
    saved = {files.optimizer[rank]: _facts(content) for rank, content in sorted(optimizers.items())}
    for group in (facts, saved):
        for name in list(group)[1:]:
            with errors.collect():
                _require_same(files, group, next(iter(group)), name, "")
    if saved:  # DeepSpeed writes its version and its configuration into all files
        with errors.collect():
            both = {**facts, **saved}
            _require_same(files, both, next(iter(facts)), next(iter(saved)), "ds_")
    for rank, content in optimizers.items():
        with errors.collect():
            _check_partition_count(content, models[0].dp_world_size, files.file_path(files.optimizer[rank]))
    errors.raise_if_any()


def _check_partition_count(content: Mapping[str, Any], world_size: int, where: str) -> None:
    counts = content["optimizer_state_dict"].get("partition_count")
    for count in counts if isinstance(counts, list | tuple) else [counts]:
        if count not in {None, world_size}:
            raise CheckpointError(
                f"{where}: {count} ranks wrote this optimizer file, but {world_size} ranks wrote the model "
                "file: the directory mixes files of different runs."
            )


def _facts(content: Mapping[str, Any]) -> _Facts:
    """Every plain value in `content` by its dotted key. Of a tensor with dimensions, only its dtype."""
    found: _Facts = {}
    pending: list[tuple[str, int, Any]] = [("", 0, content)]
    num_visited = 0
    while pending:
        key, depth, value = pending.pop()
        num_visited += 1
        # An object that occurs in itself, or many times, makes a short file endless.
        if depth > _MAX_DEPTH or num_visited > _MAX_ENTRIES:
            raise CheckpointError(f"{key[:200]} has too many entries: DeepSpeed did not write this file.")
        if isinstance(value, OpaqueObject):
            found[key] = f"{value.module}.{value.name}"
            value = value.fields
        if isinstance(value, Mapping | list | tuple):
            entries = value.items() if isinstance(value, Mapping) else enumerate(value)
            below = [(f"{key}.{n}".lstrip("."), depth + 1, v) for n, v in entries if n not in _OF_ONE_RANK]
            pending += reversed(below)
        elif isinstance(value, StoredTensor):
            found[key] = str(value.dtype) if value.shape else repr(value.item())
        else:
            found[key] = repr(value) if isinstance(value, _PLAIN) else type(value).__name__
    return found


def _require_same(
    files: DeepSpeedFiles, facts: Mapping[str, _Facts], one: str, other: str, prefix: str
) -> None:
    a, b = facts[one], facts[other]
    keys = [key for key in {**a, **b} if key.startswith(prefix) and a.get(key) != b.get(key)]
    if keys:
        shown = "; ".join(
            f"{key} is {a.get(key, 'absent')} and {b.get(key, 'absent')}" for key in keys[:_SHOWN_DIFFERENCES]
        )
        more = f", and {len(keys) - _SHOWN_DIFFERENCES} more differ" if len(keys) > _SHOWN_DIFFERENCES else ""
        raise CheckpointError(
            f"{files.path} mixes files of different tags or runs: in {one} and {other}, {shown}{more}. "
            "Copy the whole directory of one tag again."
        )


def check_copies(what: str, partitions: Mapping[str, Sequence[StoredTensor]]) -> None:
    """Raise `CheckpointError` if two files have the same partitions, which must differ from rank to rank.

    `partitions` are by the path of the file. A sample decides; one with few distinct values says nothing.
    """
    paths: dict[bytes, str] = {}
    for path, tensors in partitions.items():
        sample = _sample(tensors)
        if len(set(sample.tolist())) < _DISTINCT_VALUES:
            continue
        first = paths.setdefault(sample.numpy().tobytes(), path)
        if first != path:
            raise CheckpointError(
                f"{path} has the same {what} as {first}: it is a copy in place of that rank's own file. "
                "Copy the whole directory of one tag again."
            )


def _sample(tensors: Sequence[StoredTensor]) -> Tensor:
    """Elements at the begin, in the middle and at the end of a few tensors, in fp32."""
    parts = [torch.empty(0)]
    for tensor in tensors[:_SAMPLED_TENSORS]:
        for start in (0, tensor.numel // 2, max(tensor.numel - _SAMPLED_NUMEL, 0)):
            parts.append(tensor.read(start, min(start + _SAMPLED_NUMEL, tensor.numel)).float())
    return torch.cat(parts)


def compare_weights(path: str, masters: SegmentTable, module: Mapping[str, StoredTensor]) -> list[str]:
    """Compare a sample of each optimizer file's weights with the weights in the model file.

    Returns notes on single weights that differ. Raises `CheckpointError` if most of a file's do: then it is
    of another save or another run than the model file.
    """
    by_file: dict[str, list[tuple[str, Segment]]] = {}
    for name, states in masters.by_parameter.items():
        for segment in states.get(WEIGHT, ()) if name in module else ():
            by_file.setdefault(segment.tensor.path, []).append((name, segment))
    notes = []
    for file, segments in by_file.items():
        sampled = segments[:: max(len(segments) // max(_COMPARED_SEGMENTS // len(by_file), 3), 1)]
        differing = [name for name, segment in sampled if not _is_rounded(segment, module[name])]
        if 2 * len(differing) > len(sampled):
            raise CheckpointError(
                f"{path} mixes files of different tags or runs: the weights in {file} are not those in the "
                f"model file, such as {differing[0]!r}. Copy the whole directory of one tag again."
            )
        notes += [f"{name} has other values in the model file than in {file}." for name in differing]
    return notes


def _is_rounded(segment: Segment, weight: StoredTensor) -> bool:
    numel = min(segment.stop - segment.start, _COMPARED_NUMEL)
    master = segment.tensor.read(segment.offset, segment.offset + numel).to(weight.dtype)
    return torch.equal(master.nan_to_num(), weight.read(segment.start, segment.start + numel).nan_to_num())


def check_progress(path: str, model: ModelFile, counts: Iterable[int | None], *, is_certain: bool) -> str:
    """Compare the optimizer's update counts with the model file's steps; returns what stays unknown.

    Without other evidence (`is_certain`), raises `CheckpointError` if no group has as many updates.
    """
    found = sorted({count for count in counts if count is not None})
    num_steps = model.global_steps - model.skipped_steps
    if not found:
        return "The optimizer counts no updates, so they were not compared with the model file's steps."
    # Some versions of DeepSpeed make one update of zeros at the start.
    if {num_steps, num_steps + 1} & set(found):
        return ""
    message = (
        f"the optimizer files of {path} count {' and '.join(map(str, found))} updates, but its model file "
        f"{num_steps} steps"
    )
    if is_certain:
        return f"{message}: the optimizer was started anew, or its counts were changed."
    raise CheckpointError(
        f"{message}: they are of different tags, or the optimizer was started anew between them. "
        "Copy the whole directory of one tag again. If the optimizer was started anew, save at stage 2."
    )
