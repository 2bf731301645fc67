"""Model files of DeepSpeed: module state dict, frozen and tied parameters, buffers, progress."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from distft.checkpoint.formats.deepspeed_layout import Span, stage3_partition_numel
from distft.checkpoint.formats.deepspeed_optimizer import OptimizerStates
from distft.checkpoint.formats.segments import SegmentTable
from distft.checkpoint.formats.torch_values import OpaqueObject, StoredTensor
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import Manifest, ParameterRecord, Progress, StateRecord

PARAM_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)
_DTYPE_NAMES = {dtype: name for name, dtype in PARAM_DTYPES.items()}

# Keys of a model file that DeepSpeed writes itself; all others are the script's client_state.
_DEEPSPEED_KEYS = frozenset(
    [
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "universal_checkpoint_info",
        "ds_config",
        "ds_version",
    ]
)


@dataclass(frozen=True, slots=True)
class ExtraState:
    """Contents of a DeepSpeed checkpoint other than parameters; a conversion to DeepSpeed includes them."""

    lr_scheduler: Any = None  # its state dict
    client_state: Mapping[str, Any] | None = None
    loss_scaler: OpaqueObject | None = None  # fp16 only

    @classmethod
    def of(cls, model: Mapping[str, Any], loss_scaler: Any = None) -> "ExtraState":
        client_state = {key: value for key, value in model.items() if key not in _DEEPSPEED_KEYS}
        scaler = loss_scaler if isinstance(loss_scaler, OpaqueObject) else None
        return cls(model.get("lr_scheduler"), client_state, scaler)


@dataclass(frozen=True, slots=True)
class ModelStates:
    """Contents of the *_model_states.pt files, over all ranks."""

    names: tuple[str, ...]  # in the order of the state dict, without the further names of tied tensors
    module: dict[str, StoredTensor]  # parameters are empty at stage 3
    buffers: frozenset[str]
    tied: dict[str, str]  # further name -> name in `module`
    weights: SegmentTable  # at stage 3 only those of frozen parameters and buffers
    frozen_shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, models: Mapping[int, Mapping[str, Any]], *, is_stage3: bool) -> "ModelStates":
        """From the contents of the model files by rank: of all ranks at stage 3, else of rank 0."""
        first = models[0]
        stored = {name: value for name, value in first["module"].items() if isinstance(value, StoredTensor)}
        tied = _find_tied(stored, first.get("shared_params") or {})
        module = {name: tensor for name, tensor in stored.items() if name not in tied}
        buffers = frozenset(name for name in first.get("buffer_names") or () if name in module)
        shapes = {name: tuple(s) for name, s in (first.get("frozen_param_shapes") or {}).items()}
        weights = SegmentTable()
        for name, tensor in module.items():
            if name in buffers or not is_stage3:
                weights.add_whole(name, WEIGHT, tensor)
        if is_stage3:
            _add_frozen_partitions(weights, shapes, models)
        return cls(tuple(module), module, buffers, tied, weights, shapes)

    @property
    def param_dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        dtypes = [tensor.dtype for name, tensor in self.module.items() if name not in self.buffers]
        return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)

    def shape(self, name: str, optimizer_states: OptimizerStates) -> tuple[int, ...]:
        shape = optimizer_states.shapes.get(name, self.frozen_shapes.get(name))
        return self.module[name].shape if shape is None else shape


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
    weights: SegmentTable, shapes: Mapping[str, tuple[int, ...]], models: Mapping[int, Mapping[str, Any]]
) -> None:
    """Add the frozen parameters of stage 3: every rank has a partition of each; the last ones are padded."""
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        size = stage3_partition_numel(numel, len(models))
        for rank, model in sorted(models.items()):
            span = Span(name, min(rank * size, numel), min((rank + 1) * size, numel))
            weights.add_spans(WEIGHT, [span], model["frozen_param_fragments"][name])


def build_manifest(
    model: Mapping[str, Any],
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
    for name in dict.fromkeys([*model_states.names, *optimizer_states.shapes, *model_states.frozen_shapes]):
        table = optimizer_states.segments if name in optimizer_states.shapes else model_states.weights
        if name not in table.by_parameter:
            continue  # the script saved with exclude_frozen_parameters
        segments.by_parameter[name] = table.by_parameter[name]
        records[name] = ParameterRecord(
            shape=model_states.shape(name, optimizer_states),
            trainable=name in optimizer_states.shapes,
            updates=optimizer_states.updates.get(name, 0),
            states={
                state: StateRecord(dtype=str(dtype).removeprefix("torch."))
                for state, dtype in table.dtypes(name).items()
            },
            is_buffer=name in model_states.buffers,
        )
    manifest = Manifest(
        run_id=run_id,
        progress=Progress(
            step=model["global_steps"],
            sequences_seen=model.get("global_samples") or 0,
            skipped_steps=model["skipped_steps"],
            loss_scale=loss_scale,
        ),
        config={},
        written_by={
            "engine": "deepspeed",
            "zero_stage": zero_stage,
            "world_size": model["dp_world_size"],
            "param_dtype": _DTYPE_NAMES.get(model_states.param_dtype, str(model_states.param_dtype)),
            "ds_version": str(model.get("ds_version")),
        },
        parameters=records,
        tied={name: kept for name, kept in model_states.tied.items() if kept in records},
        groups=optimizer_states.groups,
        files=[],
    )
    return manifest, segments
