"""Where DeepSpeed keeps things. The only module that touches its private names.

Every layout yields, for this rank, `Held` views of live memory: writing to them changes the run's state.
Stages 0-3 in fp32, bf16 and fp16, with and without offload, were compared element by element with plain
torch; another DeepSpeed may lay things out otherwise, so its version is checked before anything is touched.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from distft.checkpoint.fragments import MOMENTS
from distft.errors import ConfigError

_KNOWN_VERSIONS = ("0.19.",)


@dataclass(frozen=True, slots=True)
class Held:
    """What this rank has of one trainable parameter: elements from `start` on, as views of live memory."""

    parameter: str
    start: int
    master: Tensor
    moments: Mapping[str, Tensor]
    updates: Tensor  # the optimizer's own count, a scalar; shared by a whole flat group


def check_version() -> None:
    """Refuse a DeepSpeed whose layout is not known here."""
    if not deepspeed.__version__.startswith(_KNOWN_VERSIONS):
        raise ConfigError(
            f"deepspeed {deepspeed.__version__} is installed; distft knows the memory layout of "
            f"{', '.join(v + 'x' for v in _KNOWN_VERSIONS)}. Install one of these."
        )


def skip_jit_builds() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives: 50-98 s, and the same results without."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer below whatever DeepSpeed wrapped around it."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def create_optimizer_state(engine: Any, zero_stage: int, updates_by_group: Sequence[int]) -> None:
    """Make moments (zeros) and update counts, which DeepSpeed would only make at its first step."""
    inner = inner_optimizer(engine)
    for flat, group in _flat_parameters(engine, zero_stage):
        inner.state[flat] = {
            "step": torch.tensor(float(updates_by_group[group]), device=flat.device),
            **{moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS},
        }


def _flat_parameters(engine: Any, zero_stage: int) -> Iterator[tuple[Tensor, int]]:
    """What the inner optimizer updates, with the number of the parameter group that it belongs to."""
    optimizer = engine.optimizer
    if zero_stage == 3:
        for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            yield flat, optimizer.sub_group_to_group_id[i]
    elif zero_stage in (1, 2):
        for i, flat in enumerate(_flat_partitions(optimizer)):
            yield flat, i
    else:
        for i, group in enumerate(inner_optimizer(engine).param_groups):
            for param in group["params"]:
                yield param, i


def _flat_partitions(optimizer: Any) -> Sequence[Tensor]:
    """Stages 1 and 2: this rank's fp32 partition of each group, under either wrapper's name for it."""
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer: stage 1, bf16, fp32 accumulation
        return optimizer.fp32_groups_flat_partition  # type: ignore[no-any-return]
    return optimizer.single_partition_of_fp32_groups  # type: ignore[no-any-return]


def held(engine: Any, zero_stage: int, params: Mapping[str, nn.Parameter]) -> Iterator[Held]:
    """This rank's part of every trainable parameter; at stage 0 that is all of it, on every rank."""
    trainable = {name: param for name, param in params.items() if param.requires_grad}
    by_stage = {0: _held_whole, 1: _held_flat, 2: _held_flat, 3: _held_sliced}
    return by_stage[zero_stage](engine, trainable)


def _views(state: Mapping[str, Tensor], start: int, numel: int) -> dict[str, Tensor]:
    return {moment: state[moment].view(-1).narrow(0, start, numel) for moment in MOMENTS}


def _held_whole(engine: Any, params: Mapping[str, nn.Parameter]) -> Iterator[Held]:
    """Stage 0: every rank has everything."""
    optimizer, inner = engine.optimizer, inner_optimizer(engine)
    masters: dict[int, Tensor] = {}
    if optimizer is not inner:  # bf16 or fp16: fp32 copies, parameter by parameter
        for low_group, high_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            masters |= {id(low): high for low, high in zip(low_group, high_group, strict=True)}
    for name, param in params.items():
        master = masters.get(id(param), param)
        state = inner.state[master]
        yield Held(name, 0, master.detach().view(-1), _views(state, 0, master.numel()), state["step"])


def _held_flat(engine: Any, params: Mapping[str, nn.Parameter]) -> Iterator[Held]:
    """Stages 1 and 2: one flat buffer a group, cut evenly; a parameter may straddle ranks."""
    optimizer = engine.optimizer
    inner = optimizer.optimizer
    for name, param in params.items():
        mapping = getattr(param, "_hp_mapping", None)  # None where this rank holds nothing of it
        if mapping is None:
            continue
        flat = _flat_partitions(optimizer)[mapping.param_group_index]
        address, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
        state = inner.state[flat]
        master = flat.detach().narrow(0, address.start, address.numel)
        yield Held(name, start, master, _views(state, address.start, address.numel), state["step"])


def _held_sliced(engine: Any, params: Mapping[str, nn.Parameter]) -> Iterator[Held]:
    """Stage 3: each parameter cut into equal slices, the last ones padded."""
    optimizer = engine.optimizer
    inner = optimizer.optimizer
    for name, param in params.items():
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        start, stop = slice_of(engine, param)
        state = inner.state[flat]
        master = flat.detach().narrow(0, offset, stop - start)
        yield Held(name, start, master, _views(state, offset, stop - start), state["step"])


def slice_of(engine: Any, param: nn.Parameter) -> tuple[int, int]:
    """Which elements of a stage-3 parameter this rank has."""
    numel, per_rank = param.ds_numel, param.ds_tensor.ds_numel  # type: ignore[attr-defined]
    rank = engine.global_rank
    return min(rank * per_rank, numel), min((rank + 1) * per_rank, numel)


def low_precision_slice(engine: Any, param: nn.Parameter) -> tuple[int, Tensor]:
    """Stage 3: (start, view) of the part of the weight that this rank computes with."""
    start, stop = slice_of(engine, param)
    return start, param.ds_tensor.data.view(-1).narrow(0, 0, stop - start)  # type: ignore[attr-defined]


def is_gathered(param: nn.Parameter) -> bool:
    """Stage 3 keeps small weights whole on every rank, beside their slices."""
    status = deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.AVAILABLE
    return param.ds_status == status  # type: ignore[attr-defined,no-any-return]


def allocate_sliced(
    module: nn.Module, config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> None:
    """Give a module on the meta device stage-3 parameters: memory for one whole parameter at a time."""
    context = deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, param in list(owner.named_parameters(recurse=False)):
            if param not in made:
                values = torch.zeros(param.shape, dtype=dtype, device=device)
                made[param] = nn.Parameter(values, requires_grad=param.requires_grad)
                context._zero_init_param(made[param])
            setattr(owner, name, made[param])


def set_loss_scale(engine: Any, zero_stage: int, scale: float) -> None:
    """Override DeepSpeed's fp16 loss scale for the next backward and step."""
    if zero_stage == 0:
        engine.optimizer.loss_scale_config.cur_scale = scale
    else:
        engine.optimizer.override_loss_scale(scale)
