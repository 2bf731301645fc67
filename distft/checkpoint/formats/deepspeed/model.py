"""Model files of DeepSpeed: module state dict, frozen and tied parameters, buffers, progress."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch

from distft.checkpoint.formats.deepspeed.contents import ModelFile, Shapes
from distft.checkpoint.formats.deepspeed.layout import Span, stage3_partition_numel
from distft.checkpoint.formats.deepspeed.segments import SegmentTable
from distft.checkpoint.formats.deepspeed.zero_reader import OptimizerStates
from distft.checkpoint.formats.torch_file.values import StoredTensor
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import Manifest, ParameterRecord, Progress, StateRecord
from distft.errors import CheckpointError

PARAM_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)
_DTYPE_NAMES = {dtype: name for name, dtype in PARAM_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class ModelStates:
    """Contents of the *_model_states.pt files, over all ranks."""

    module: dict[str, StoredTensor]  # without further names of tied tensors; parameters are empty at stage 3
    buffers: frozenset[str]
    tied: dict[str, str]  # further name -> name in `module`
    weights: SegmentTable  # at stage 3 only those of frozen parameters and buffers
    frozen_shapes: Shapes

    @classmethod
    def of(cls, models: Mapping[int, ModelFile], path: str, *, is_stage3: bool) -> "ModelStates":
        """From the contents of the model files by rank: of all ranks at stage 3, else of rank 0."""
        first = models[0]
        stored = {name: value for name, value in first.module.items() if isinstance(value, StoredTensor)}
        tied = _find_tied(stored, first.shared_params or {})
        module = {name: tensor for name, tensor in stored.items() if name not in tied}
        buffers = frozenset(name for name in first.buffer_names or () if name in module)
        weights = SegmentTable()
        for name, tensor in module.items():
            if name in buffers or not is_stage3:
                weights.add_whole(name, WEIGHT, tensor)
        frozen = first.frozen_param_shapes or {}
        if is_stage3:
            _add_frozen_partitions(weights, frozen, models, path)
        return cls(module, buffers, tied, weights, frozen)

    @property
    def param_dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        dtypes = [tensor.dtype for name, tensor in self.module.items() if name not in self.buffers]
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _find_tied(module: Mapping[str, StoredTensor], shared_params: Mapping[str, str]) -> dict[str, str]:
    """Tied names: those that DeepSpeed recorded, and names that share a tensor in the file."""
    tied = dict(shared_params)
    first_names: dict[tuple[object, ...], str] = {}
    for name, tensor in module.items():
        if tensor.numel and name not in tied:
            location = (tensor.offset, tensor.shape, tensor.stride, tensor.dtype)
            if first_names.setdefault(location, name) != name:
                tied[name] = first_names[location]
    return tied


def _add_frozen_partitions(
    weights: SegmentTable, shapes: Shapes, models: Mapping[int, ModelFile], path: str
) -> None:
    """Add the frozen parameters of stage 3: every rank has a partition of each; the last ones are padded."""
    for name, shape in shapes.items():
        numel = prod(shape)
        size = stage3_partition_numel(numel, len(models))
        for rank, model in sorted(models.items()):
            fragment = (model.frozen_param_fragments or {}).get(name)
            span = Span(name, min(rank * size, numel), min((rank + 1) * size, numel))
            if fragment is None or fragment.numel < span.numel:
                raise CheckpointError(
                    f"{path}: the model file of rank {rank} lacks elements of the frozen {name!r}: "
                    "it is damaged, or of another run."
                )
            weights.add_spans(WEIGHT, [span], fragment)


def build_manifest(
    model: ModelFile,
    model_states: ModelStates,
    optimizer_states: OptimizerStates,
    *,
    run_id: str,
    loss_scale: dict[str, float] | None,
    zero_stage: int | str,
) -> tuple[Manifest, SegmentTable]:
    """A manifest that describes a DeepSpeed checkpoint, and the segments of all its states."""
    segments = SegmentTable()
    records: dict[str, ParameterRecord] = {}
    trained, frozen = optimizer_states.shapes, model_states.frozen_shapes
    for name in dict.fromkeys([*model_states.module, *trained, *frozen]):
        table = optimizer_states.segments if name in trained else model_states.weights
        if name not in table.by_parameter:
            continue  # the script saved with exclude_frozen_parameters
        segments.by_parameter[name] = table.by_parameter[name]
        shape = trained.get(name, frozen.get(name))
        records[name] = ParameterRecord(
            shape=model_states.module[name].shape if shape is None else shape,
            trainable=name in trained,
            updates=optimizer_states.updates.get(name) or 0,
            states={
                state: StateRecord(dtype=str(dtype).removeprefix("torch."))
                for state, dtype in table.dtypes(name).items()
            },
            is_buffer=name in model_states.buffers,
        )
    manifest = Manifest(
        run_id=run_id,
        progress=Progress(
            step=model.global_steps,
            sequences_seen=model.global_samples or 0,
            skipped_steps=model.skipped_steps,
            loss_scale=loss_scale,
        ),
        config={},
        written_by={
            "engine": "deepspeed",
            "zero_stage": zero_stage,
            "world_size": model.dp_world_size,
            "param_dtype": _DTYPE_NAMES.get(model_states.param_dtype, str(model_states.param_dtype)),
            "ds_version": str(model.ds_version),
        },
        parameters=records,
        tied={name: kept for name, kept in model_states.tied.items() if kept in records},
        groups=optimizer_states.groups,
        files=[],
    )
    return manifest, segments
