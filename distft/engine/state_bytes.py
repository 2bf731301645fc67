"""How many bytes of weights, gradients and optimizer state each rank allocates. Arithmetic only.

tests/engine/test_state_bytes.py compares it with what engines really allocate. Activations and temporary
copies come on top; they depend on the batch, the compiler and the machine.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from distft.engine.deepspeed_config import ZeroConfig
from distft.engine.settings import EngineSettings
from distft.optim.groups import ParameterGroup
from distft.optim.patterns import is_moved_by_rule
from distft.optim.settings import OptimizerSettings

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32 = 4
_NF4_BLOCK = 64  # elements with one scale
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
    optim: OptimizerSettings,
    world_size: int,
    *,
    quantizable: Collection[str] = (),
) -> StateBytes:
    """The states of a model with parameters of these `shapes`, of which those in `groups` train.

    Those of `quantizable` that do not are in `engine.frozen_bits`.
    """
    trained = {name for group in groups for name in group.names}
    quantized = {} if engine.frozen_bits is None else {n: shapes[n] for n in quantizable if n not in trained}
    bits = engine.frozen_bits or 0
    state = _plain_state_bytes(
        {name: shape for name, shape in shapes.items() if name not in quantized},
        groups,
        engine,
        optim,
        world_size,
    )
    in_bits = sum(_quantized_bytes(*shape, bits=bits) for shape in quantized.values())
    return replace(state, weights=state.weights + in_bits)


def _quantized_bytes(rows: int, columns: int, *, bits: int) -> int:
    """Of a matrix: its codes, and scales in fp32."""
    if bits == 8:
        return rows * columns + _FP32 * rows
    num_blocks = -(-rows * columns // _NF4_BLOCK)
    return num_blocks * (_NF4_BLOCK // 2 + _FP32)


def _plain_state_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    groups: Sequence[ParameterGroup],
    engine: EngineSettings,
    optim: OptimizerSettings,
    world_size: int,
) -> StateBytes:
    numel = {name: prod(shape) for name, shape in shapes.items()}
    trainable = [_GroupSizes(group, [numel.pop(name) for name in group.names]) for group in groups]
    frozen = list(numel.values())
    weight = _BYTES[engine.param_dtype]
    is_zero = isinstance(engine, ZeroConfig)
    if isinstance(engine, ZeroConfig) and engine.zero_stage == 3:
        return _stage3(trainable, frozen, engine, optim, world_size)
    if isinstance(engine, ZeroConfig) and engine.zero_stage > 0:
        return _stages12(trainable, frozen, engine, optim, world_size)
    num_trainable = sum(group.total for group in trainable)
    num_masters = 0 if engine.param_dtype == "fp32" else num_trainable
    moments = sum(group.moment_bytes * group.total for group in trainable)
    return StateBytes(
        weights=weight * (num_trainable + sum(frozen)),
        # In bf16 and fp16 stage 0 adds gradients up in that format; the update makes fp32 copies.
        gradients=_FP32 * num_trainable + (weight * num_masters if is_zero else 0),
        optimizer=_FP32 * num_masters + moments + _average_bytes(optim) * num_trainable,
    )


class _GroupSizes:
    """The numbers of elements of a group's parameters."""

    def __init__(self, group: ParameterGroup, sizes: list[int]) -> None:
        self.sizes = sizes
        self.total = sum(sizes)
        self.moment_bytes = _FP32 * len(group.rule.moments)  # per element


def _stages12(
    trainable: list[_GroupSizes],
    frozen: list[int],
    engine: ZeroConfig,
    optim: OptimizerSettings,
    world_size: int,
) -> StateBytes:
    """All groups are one flat buffer with padding at its end, of which a rank updates an equal part."""
    num_trainable = sum(group.total for group in trainable)
    multiple = _ALIGNMENT * world_size
    padded = -(-num_trainable // multiple) * multiple
    of_a_rank = padded // world_size
    is_bf16 = engine.param_dtype == "bf16"
    # The update copies the rank's part, but not in bf16 at stage 1 or over ranks. Not counted: in fp32 both
    # ranks on which a parameter lies keep its whole gradient.
    copied = 0 if is_bf16 and (engine.zero_stage == 1 or world_size > 1) else of_a_rank
    whole = padded if is_bf16 else num_trainable  # stage 2 frees the others' parts at once
    gradients = _FP32 * max(whole if engine.zero_stage == 1 else 0, of_a_rank + copied)
    averaged = _average_bytes(optim) * min(of_a_rank, num_trainable)
    optimizer = _FP32 * of_a_rank + _most_moments(trainable, of_a_rank, padded) + averaged
    return StateBytes(
        weights=_BYTES[engine.param_dtype] * (padded + sum(frozen)),
        gradients=gradients,
        optimizer=optimizer,
        offloaded=0 if engine.offload_optimizer == "none" else optimizer + _FP32 * of_a_rank,
    )


def _most_moments(trainable: list[_GroupSizes], of_a_rank: int, padded: int) -> int:
    """Bytes of moments of the rank that has the most, if groups lie one behind the other."""
    most = 0
    for begin in range(0, padded, of_a_rank):
        moments, start = 0, 0
        for number, group in enumerate(trainable):
            # The padding counts to the last group.
            stop = padded if number == len(trainable) - 1 else start + group.total
            moments += group.moment_bytes * max(0, min(stop, begin + of_a_rank) - max(start, begin))
            start = stop
        most = max(most, moments)
    return most


def _stage3(
    trainable: list[_GroupSizes],
    frozen: list[int],
    engine: ZeroConfig,
    optim: OptimizerSettings,
    world_size: int,
) -> StateBytes:
    """Each parameter is cut into equal parts, the last of them padded."""
    zero = {**_STAGE3_DEFAULTS, **engine.deepspeed.get("zero_optimization", {})}
    threshold = zero["stage3_param_persistence_threshold"]  # smaller parameters are also kept whole
    all_sizes = [*(size for group in trainable for size in group.sizes), *frozen]
    parts = _BYTES[engine.param_dtype] * sum(-(-size // world_size) for size in all_sizes)
    whole = sum(size for size in all_sizes if size <= threshold) if world_size > 1 else 0
    of_each_group = [sum(-(-size // world_size) for size in group.sizes) for group in trainable]
    of_a_rank = sum(of_each_group)
    copied = min(of_a_rank, zero["sub_group_size"])  # by the update, one part at a time
    moments = sum(group.moment_bytes * n for group, n in zip(trainable, of_each_group, strict=True))
    optimizer = (_FP32 + _average_bytes(optim)) * of_a_rank + moments
    offloaded = 0 if engine.offload_optimizer == "none" else optimizer + _FP32 * of_a_rank
    return StateBytes(
        weights=parts + _BYTES[engine.param_dtype] * whole,
        gradients=_FP32 * (of_a_rank + copied),
        optimizer=optimizer,
        buffers=_BYTES[engine.reduce_dtype] * engine.reduce_bucket_size if world_size > 1 else 0,
        offloaded=offloaded + (0 if engine.offload_param == "none" else parts),
    )


def _average_bytes(optim: OptimizerSettings) -> int:
    """Per element."""
    return 0 if optim.ema_decay is None else _FP32


def checkpoint_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    groups: Sequence[ParameterGroup],
    optim: OptimizerSettings,
    original_bytes: Callable[[str], int],
) -> tuple[int, int]:
    """Bytes of a commit's trainable parameters, and of the frozen weights that all commits of a run share.

    `original_bytes`: of an element of a frozen parameter, by name. Headers, manifest and tokenizer come on
    top.
    """
    numel = {name: prod(shape) for name, shape in shapes.items()}
    trainable = [_GroupSizes(group, [numel.pop(name) for name in group.names]) for group in groups]
    num_moved = sum(numel.pop(name) for name in shapes if is_moved_by_rule(name))
    own = sum((_FP32 + group.moment_bytes + _average_bytes(optim)) * group.total for group in trainable)
    return own + _FP32 * num_moved, sum(size * original_bytes(name) for name, size in numel.items())
