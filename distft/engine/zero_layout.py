"""Where DeepSpeed ZeRO keeps weights and optimizer state; only this module uses DeepSpeed's private names.

For every stage `master_slices` yields this rank's slices of the master weights: views of live memory, so
writing to them changes the training state. We compared stages 0-3 in fp32, bf16 and fp16, with and without
offload, element by element with plain torch. Another DeepSpeed may use another layout, so `check_version`
comes first.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distft.engine.deepspeed_import import deepspeed
from distft.engine.memory import replace_parameters
from distft.errors import ConfigError
from distft.optim.segments import MasterSlice

_KNOWN_VERSIONS = ("0.19.",)


def check_version() -> None:
    """Raise `ConfigError` for a DeepSpeed whose memory layout this module does not know."""
    if not deepspeed.__version__.startswith(_KNOWN_VERSIONS):
        raise ConfigError(
            f"deepspeed {deepspeed.__version__} is installed; distft knows the memory layout of "
            f"{', '.join(v + 'x' for v in _KNOWN_VERSIONS)}. Install one of these."
        )


def skip_jit_builds() -> None:
    """Keep DeepSpeed from compiling what distft does not use; it changes no result.

    Its shared-memory collectives take 50-98 s. ZeRO also imports Muon at each start, which imports torch's
    compiler for its kernels: 1.5 s.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    compiler = deepspeed.runtime.compiler
    torch_compile, compiler.compile = compiler.compile, lambda: lambda kernel: kernel
    try:
        import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = torch_compile


def accept_optimizer(kind: type[torch.optim.Optimizer]) -> None:
    """Have DeepSpeed take `kind`, a subclass of an optimizer that it supports, without a warning."""
    supported = deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS
    if kind not in supported:
        supported.append(kind)


def _is_bf16_stage1(optimizer: Any) -> bool:
    """Whether it is DeepSpeed's BF16_Optimizer: stage 1, bf16, gradients accumulated in fp32."""
    return hasattr(optimizer, "fp32_groups_flat_partition")


def _flat_partitions(optimizer: Any) -> Sequence[Tensor]:
    """Stages 1 and 2: this rank's fp32 partition of each group, under either wrapper's name."""
    if _is_bf16_stage1(optimizer):
        return optimizer.fp32_groups_flat_partition  # type: ignore[no-any-return]
    return optimizer.single_partition_of_fp32_groups  # type: ignore[no-any-return]


def master_slices(engine: Any, zero_stage: int, params: Mapping[str, nn.Parameter]) -> Iterator[MasterSlice]:
    """This rank's slice of every trainable parameter; at stage 0 that is the whole parameter."""
    trainable = {name: param for name, param in params.items() if param.requires_grad}
    if zero_stage == 0:
        return _slices_stage0(engine, trainable)
    if zero_stage == 3:
        return _slices_stage3(engine, trainable)
    return _slices_stage12(engine, trainable)


def _slices_stage0(engine: Any, params: Mapping[str, nn.Parameter]) -> Iterator[MasterSlice]:
    """Stage 0 partitions nothing: one slice is the whole parameter."""
    optimizer = engine.optimizer
    masters: dict[int, Tensor] = {}
    if not isinstance(optimizer, torch.optim.Optimizer):  # bf16 and fp16: an fp32 copy of each parameter
        for low_group, high_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= {id(low): high for low, high in zip(low_group, high_group, strict=True)}
    for name, param in params.items():
        master = masters.get(id(param), param)
        yield MasterSlice(name, tuple(param.shape), 0, master, 0, master.numel())


def _slices_stage12(engine: Any, params: Mapping[str, nn.Parameter]) -> Iterator[MasterSlice]:
    """Stages 1 and 2 cut each group's flat buffer evenly, so a parameter may lie on several ranks."""
    for name, param in params.items():
        mapping = getattr(param, "_hp_mapping", None)  # None: this rank has no element of it
        if mapping is None:
            continue
        flat = _flat_partitions(engine.optimizer)[mapping.param_group_index]
        # `hp` (high precision) is the position in this rank's fp32 buffer, `lp` that in the parameter.
        address, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
        yield MasterSlice(name, tuple(param.shape), start, flat, address.start, address.numel)


def _slices_stage3(engine: Any, params: Mapping[str, nn.Parameter]) -> Iterator[MasterSlice]:
    """Stage 3 cuts each parameter evenly and pads the last slices."""
    optimizer = engine.optimizer
    for name, param in params.items():
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        start, stop = _stage3_range(engine, param)
        shape = tuple(param.ds_shape)  # type: ignore[attr-defined]
        yield MasterSlice(name, shape, start, flat, offset, stop - start)


def _stage3_range(engine: Any, param: nn.Parameter) -> tuple[int, int]:
    """Elements [start, stop) of a stage-3 parameter that lie on this rank, without padding."""
    numel, per_rank = param.ds_numel, param.ds_tensor.ds_numel  # type: ignore[attr-defined]
    rank = engine.global_rank
    return min(rank * per_rank, numel), min((rank + 1) * per_rank, numel)


def stage3_weights(engine: Any, param: nn.Parameter) -> tuple[int, Tensor]:
    """Stage 3: (start, view) of this rank's slice of the weights that the model computes with."""
    start, stop = _stage3_range(engine, param)
    return start, param.ds_tensor.data.view(-1).narrow(0, 0, stop - start)  # type: ignore[attr-defined]


def write_stage3_weights(engine: Any, param: nn.Parameter, values: Tensor) -> None:
    """Stage 3: give a frozen parameter other weights on this rank; `values` has all of them."""
    start, own = stage3_weights(engine, param)
    own.copy_(values.view(-1)[start : start + own.numel()])
    if is_gathered(param):
        param.detach().copy_(values)


@contextmanager
def replaced_stage3_weights(
    engine: Any, params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Stage 3: this rank's slices of the weights are `values` inside, and what they were before after it.

    Gathered parameters are freed at both ends, so that forwards gather them anew.
    """
    views = {name: stage3_weights(engine, params[name])[1] for name in values}
    own = {name: view.clone() for name, view in views.items()}
    free_gathered = engine.optimizer.parameter_offload.partition_all_parameters
    free_gathered()
    try:
        for name, view in views.items():
            view.copy_(values[name])
        yield
    finally:
        free_gathered()
        for name, view in views.items():
            view.copy_(own[name])


def is_gathered(param: nn.Parameter) -> bool:
    """Whether this rank also has the whole stage-3 parameter; of small ones DeepSpeed always keeps it."""
    status = deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.AVAILABLE
    return param.ds_status == status  # type: ignore[attr-defined,no-any-return]


def allocate_stage3(
    module: nn.Module, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> None:
    """Turn meta parameters into stage-3 parameters; only one of them is in memory whole at a time."""
    context = deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype)

    def partitioned(param: nn.Parameter) -> nn.Parameter:
        values = torch.zeros(param.shape, dtype=dtype, device=device)
        whole = nn.Parameter(values, requires_grad=param.requires_grad)
        context._zero_init_param(whole)  # keeps this rank's partition and frees the rest
        return whole

    replace_parameters(module, partitioned)


def update_without_waiting(engine: Any) -> None:
    """Stages 1 and 2: have DeepSpeed's step take the gradients as they are.

    In fp16, and in bf16 at stage 1, it would look for overflow on the host, whatever its configuration.
    """
    optimizer = engine.optimizer
    if not _is_bf16_stage1(optimizer):
        optimizer.check_grad_overflow = False
        return  # the configuration turns the norm off

    def step() -> None:
        for partition, gradient in zip(
            optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition, strict=True
        ):
            partition.grad = gradient
        optimizer.optimizer.step()
        optimizer.update_lp_params()  # the engine clears the gradients

    optimizer.step = step


def clear_gradients(engine: Any, zero_stage: int, params: Iterable[nn.Parameter]) -> None:
    """Before a step: no gradient of `params` yet.

    At stage 3, and with gradients in host memory, DeepSpeed keeps the last step's until a backward overwrites
    it. It would apply the gradient of a head once more in a step that does not use the head.
    """
    optimizer = engine.optimizer
    is_offloaded = getattr(optimizer, "offload_optimizer" if zero_stage == 3 else "cpu_offload", False)
    for param in params:
        if zero_stage == 3:
            number = param.ds_id  # type: ignore[attr-defined]
            optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[number].zero_()
        number = optimizer.get_param_id(param) if is_offloaded else None
        if number in getattr(optimizer, "grad_position", {}):  # otherwise this rank has no element of it
            group, *_, offset, numel = optimizer.grad_position[number]
            flat = optimizer.fp32_partitioned_groups_flat if zero_stage == 3 else _flat_partitions(optimizer)
            optimizer.norm_for_param_grads.pop(number, None)
            if flat[group].grad is not None:
                flat[group].grad.view(-1).narrow(0, offset, numel).zero_()
            if number in getattr(optimizer, "accumulated_grads_in_cpu", {}):
                optimizer.accumulated_grads_in_cpu[number].zero_()


def gradient_norm(engine: Any) -> Tensor:
    """Stages 1 and 2, after the backward: the norm of the scaled gradients; inf or nan if one is not finite.

    DeepSpeed's own norm converts all gradients to fp64, which takes longer than the optimizer's update.
    """
    optimizer = engine.optimizer
    if _is_bf16_stage1(optimizer):  # each rank has the whole sum over ranks
        return torch.nn.utils.get_total_norm(chain.from_iterable(optimizer.fp32_groups_gradients))
    by_group = optimizer.averaged_gradients
    gradients = [gradient for number in range(len(by_group)) for gradient in by_group[number]]
    # In the groups' order and squared in fp64, one rank alone gets the same norm as the local engine.
    total = torch.nn.utils.get_total_norm(gradients).to(optimizer.device).double().square()
    dist.all_reduce(total, group=optimizer.dp_process_group)
    return total.sqrt().float()


def last_grad_norm(engine: Any) -> Any:
    """The gradient norm of the last step, before clipping: a float or a tensor."""
    return engine.optimizer._global_grad_norm


def set_loss_scale(engine: Any, zero_stage: int, scale: float) -> None:
    """Override DeepSpeed's fp16 loss scale for the next backward and step."""
    if zero_stage == 0:
        engine.optimizer.loss_scale_config.cur_scale = scale
    else:
        engine.optimizer.override_loss_scale(scale)
