"""How many bytes of weights, gradients and optimizer state each rank allocates. Arithmetic only.

tests/engine/test_state_bytes.py compares it with what engines really allocate. Activations and temporary
copies come on top; they depend on the batch, the compiler and the machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from distft.engine.deepspeed_config import ZeroConfig
from distft.engine.settings import EngineSettings
from distft.optim.adamw import AdamWConfig, ParameterGroup

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32 = 4
_ALIGNMENT = 2  # DeepSpeed pads the flat buffer of a group to a multiple of this times the number of ranks
_STAGE3_DEFAULTS = {"stage3_param_persistence_threshold": 100_000, "sub_group_size": 1_000_000_000}


@dataclass(frozen=True, kw_only=True, slots=True)
class StateBytes:
    """Of the rank that has the most."""

    weights: int  # in param_dtype, the frozen ones included
    gradients: int  # at their most, before the update
    optimizer: int  # fp32 master weights, moments and the moving average
    buffers: int = 0  # of DeepSpeed, for reducing gradients; as long as the engine lives
    offloaded: int = 0  # of all these, in the host's memory instead of the device's

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers


def state_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    groups: Sequence[ParameterGroup],
    engine: EngineSettings,
    optim: AdamWConfig,
    world_size: int,
) -> StateBytes:
    """The states of a model with parameters of these `shapes`, of which those in `groups` train."""
    numel = {name: prod(shape) for name, shape in shapes.items()}
    trainable = [[numel.pop(name) for name in group.names] for group in groups]
    frozen = list(numel.values())
    weight = _BYTES[engine.param_dtype]
    is_zero = isinstance(engine, ZeroConfig)
    if isinstance(engine, ZeroConfig) and engine.zero_stage == 3:
        return _stage3(trainable, frozen, engine, optim, world_size)
    if isinstance(engine, ZeroConfig) and engine.zero_stage > 0:
        return _stages12(trainable, frozen, engine, optim, world_size)
    num_trainable = sum(map(sum, trainable))
    num_masters = 0 if engine.param_dtype == "fp32" else num_trainable
    return StateBytes(
        weights=weight * (num_trainable + sum(frozen)),
        # In bf16 and fp16 stage 0 adds gradients up in that format; the update makes fp32 copies.
        gradients=_FP32 * num_trainable + (weight * num_masters if is_zero else 0),
        optimizer=_FP32 * num_masters + (_moment_bytes(optim) + _average_bytes(optim)) * num_trainable,
    )


def _stages12(
    trainable: list[list[int]], frozen: list[int], engine: ZeroConfig, optim: AdamWConfig, world_size: int
) -> StateBytes:
    """Each group is one flat buffer with padding at its end, of which a rank updates an equal part."""
    multiple = _ALIGNMENT * world_size
    padded = [-(-sum(group) // multiple) * multiple for group in trainable]
    of_a_rank = sum(padded) // world_size
    averaged = sum(min(size // world_size, sum(group)) for size, group in zip(padded, trainable, strict=True))
    is_bf16 = engine.param_dtype == "bf16"
    # The update copies one group's part at a time, except in bf16 and on one rank. Not counted: in fp32 both
    # ranks on which a parameter lies keep its whole gradient.
    copied = 0 if is_bf16 or world_size == 1 else max(padded, default=0) // world_size
    whole = sum(padded) if is_bf16 else sum(map(sum, trainable))  # stage 2 frees the others' parts at once
    gradients = _FP32 * max(whole if engine.zero_stage == 1 else 0, of_a_rank + copied)
    optimizer = (_FP32 + _moment_bytes(optim)) * of_a_rank + _average_bytes(optim) * averaged
    return StateBytes(
        weights=_BYTES[engine.param_dtype] * (sum(padded) + sum(frozen)),
        gradients=gradients,
        optimizer=optimizer,
        offloaded=0 if engine.offload_optimizer == "none" else optimizer + _FP32 * of_a_rank,
    )


def _stage3(
    trainable: list[list[int]], frozen: list[int], engine: ZeroConfig, optim: AdamWConfig, world_size: int
) -> StateBytes:
    """Each parameter is cut into equal parts, the last of them padded."""
    zero = {**_STAGE3_DEFAULTS, **engine.deepspeed.get("zero_optimization", {})}
    threshold = zero["stage3_param_persistence_threshold"]  # smaller parameters are also kept whole
    all_sizes = [*(size for group in trainable for size in group), *frozen]
    parts = _BYTES[engine.param_dtype] * sum(-(-size // world_size) for size in all_sizes)
    whole = sum(size for size in all_sizes if size <= threshold) if world_size > 1 else 0
    of_each_group = [sum(-(-size // world_size) for size in group) for group in trainable]
    of_a_rank = sum(of_each_group)
    copied = min(max(of_each_group, default=0), zero["sub_group_size"])  # by the update, one at a time
    optimizer = (_FP32 + _moment_bytes(optim) + _average_bytes(optim)) * of_a_rank
    offloaded = 0 if engine.offload_optimizer == "none" else optimizer + _FP32 * of_a_rank
    return StateBytes(
        weights=parts + _BYTES[engine.param_dtype] * whole,
        gradients=_FP32 * (of_a_rank + copied),
        optimizer=optimizer,
        buffers=_BYTES[engine.reduce_dtype] * engine.reduce_bucket_size if world_size > 1 else 0,
        offloaded=offloaded + (0 if engine.offload_param == "none" else parts),
    )


def _moment_bytes(optim: AdamWConfig) -> int:
    """Per element."""
    return _FP32 * len(optim.moments)


def _average_bytes(optim: AdamWConfig) -> int:
    """Per element."""
    return 0 if optim.ema_decay is None else _FP32


def checkpoint_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    groups: Sequence[ParameterGroup],
    engine: EngineSettings,
    optim: AdamWConfig,
) -> tuple[int, int]:
    """Bytes of a commit's trainable parameters, and of the frozen weights that all commits of a run share.

    Headers, manifest and tokenizer come on top.
    """
    numel = {name: prod(shape) for name, shape in shapes.items()}
    num_trainable = sum(numel.pop(name) for group in groups for name in group.names)
    per_element = _FP32 + _moment_bytes(optim) + _average_bytes(optim)
    return per_element * num_trainable, _BYTES[engine.param_dtype] * sum(numel.values())
