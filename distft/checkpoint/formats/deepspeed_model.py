"""What the model files of plain DeepSpeed tell: the module's state, what is frozen or tied, the progress."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from distft.checkpoint.formats.deepspeed_layout import Run, slice_numel
from distft.checkpoint.formats.deepspeed_optimizer import Trained
from distft.checkpoint.formats.pieces import Pieces
from distft.checkpoint.formats.torch_file import ForeignObject, StoredTensor
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import Manifest, ParameterRecord, Progress, StateRecord

PARAM_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)
_OUR_NAMES = {dtype: name for name, dtype in PARAM_DTYPES.items()}

# What DeepSpeed itself keeps in a model file; the rest is the script's own.
_OWN_KEYS = frozenset(
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
class ScriptState:
    """What a script kept in a checkpoint besides parameters; it goes along when that is written anew."""

    lr_scheduler: Any = None  # its state dict
    client_state: Mapping[str, Any] | None = None
    loss_scaler: ForeignObject | None = None  # fp16 only

    @classmethod
    def of(cls, model: Mapping[str, Any], loss_scaler: Any = None) -> "ScriptState":
        own = {key: value for key, value in model.items() if key not in _OWN_KEYS}
        scaler = loss_scaler if isinstance(loss_scaler, ForeignObject) else None
        return cls(model.get("lr_scheduler"), own, scaler)


@dataclass(frozen=True, slots=True)
class ModelReading:
    """The module's state without what is trained."""

    names: tuple[str, ...]  # in the order of the state dict; tied ones under one name
    module: dict[str, StoredTensor]  # empty ones at stage 3
    buffers: frozenset[str]
    tied: dict[str, str]
    frozen: Pieces
    frozen_shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, models: Mapping[int, Mapping[str, Any]], *, is_sliced: bool) -> "ModelReading":
        """From the model files by rank: all of them at stage 3, that of rank 0 else."""
        first = models[0]
        stored = {name: value for name, value in first["module"].items() if isinstance(value, StoredTensor)}
        tied = _tied(stored, first.get("shared_params") or {})
        module = {name: tensor for name, tensor in stored.items() if name not in tied}
        buffers = frozenset(name for name in first.get("buffer_names") or () if name in module)
        shapes = {name: tuple(s) for name, s in (first.get("frozen_param_shapes") or {}).items()}
        frozen = Pieces()
        for name, tensor in module.items():
            if name in buffers or not is_sliced:
                frozen.add_whole(name, WEIGHT, tensor)
        if is_sliced:
            _add_fragments(frozen, shapes, models)
        return cls(tuple(module), module, buffers, tied, frozen, shapes)

    @property
    def param_dtype(self) -> torch.dtype:
        """What the model computes in."""
        weights = [tensor.dtype for name, tensor in self.module.items() if name not in self.buffers]
        return next((dtype for dtype in weights if dtype.is_floating_point), torch.float32)

    def shape(self, name: str, trained: Trained) -> tuple[int, ...]:
        found = trained.shapes.get(name, self.frozen_shapes.get(name))
        return self.module[name].shape if found is None else found


def _tied(module: Mapping[str, StoredTensor], told: Mapping[str, str]) -> dict[str, str]:
    """Further names of tensors: as the file tells, and where two names have the same elements in it."""
    tied = dict(told)
    first_name: dict[tuple[object, ...], str] = {}
    for name, tensor in module.items():
        if tensor.numel and name not in tied:
            place = (tensor.offset, tensor.shape, tensor.stride, tensor.dtype)
            if first_name.setdefault(place, name) != name:
                tied[name] = first_name[place]
    return tied


def _add_fragments(
    frozen: Pieces, shapes: Mapping[str, tuple[int, ...]], models: Mapping[int, Mapping[str, Any]]
) -> None:
    """Frozen parameters at stage 3: a slice on every rank, the last ones padded."""
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        size = slice_numel(numel, len(models))
        for rank, model in sorted(models.items()):
            run = Run(name, min(rank * size, numel), min((rank + 1) * size, numel))
            frozen.add_runs(WEIGHT, [run], model["frozen_param_fragments"][name])


def build_manifest(
    model: Mapping[str, Any],
    reading: ModelReading,
    trained: Trained,
    *,
    run_id: str,
    loss_scale: dict[str, float] | None,
    zero_stage: int | str,
) -> tuple[Manifest, Pieces]:
    """The manifest that tells of a foreign checkpoint, and the pieces of all its states."""
    pieces = Pieces()
    records: dict[str, ParameterRecord] = {}
    for name in dict.fromkeys([*reading.names, *trained.shapes, *reading.frozen_shapes]):
        source = trained.pieces if name in trained.shapes else reading.frozen
        if name not in source.of:
            continue  # left out by the script: exclude_frozen_parameters
        pieces.of[name] = source.of[name]
        records[name] = ParameterRecord(
            shape=reading.shape(name, trained),
            trainable=name in trained.shapes,
            updates=trained.updates.get(name, 0),
            states={
                state: StateRecord(dtype=str(dtype).removeprefix("torch."))
                for state, dtype in source.states(name).items()
            },
            is_buffer=name in reading.buffers,
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
            "param_dtype": _OUR_NAMES.get(reading.param_dtype, str(reading.param_dtype)),
            "ds_version": str(model.get("ds_version")),
        },
        parameters=records,
        tied={name: kept for name, kept in reading.tied.items() if kept in records},
        groups=trained.groups,
        files=[],
    )
    return manifest, pieces
