"""A small training script in plain DeepSpeed, without distft, that saves and loads checkpoints."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

VOCAB_SIZE, WIDTH, NUM_ROWS, SEQ_LEN = 11, 7, 12, 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Script:
    """Options of one training script."""

    stage: int
    dtype: str = "fp32"
    groups: str = "decay"  # "one": a single group; "decay": two, by dimension; "layers": two, by position
    frozen: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    with_scheduler: bool = False
    seed: int | None = None  # of the initial weights; None: 1, or 7 for a script that loads a checkpoint


class Net(nn.Module):
    """A model with tied embeddings and a buffer that changes the loss.

    Its sizes are odd, so that partitions split parameters and need padding.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.first = nn.Linear(WIDTH, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB_SIZE, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.zeros(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(self.embed(input_ids)))
        hidden = self.second(self.norm(hidden)) + self.offset.sum().to(hidden.dtype)
        return self.head(torch.tanh(hidden))


def parameter_groups(model: nn.Module, kind: str) -> list[dict[str, Any]]:
    params = [param for param in model.parameters() if param.requires_grad]
    if kind == "one":
        return [{"params": params, "lr": 3e-3}]
    if kind == "decay":
        matrices, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1]
    else:
        matrices, rest = params[:2], params[2:]
    return [
        {"params": matrices, "lr": 4e-3, "weight_decay": 0.1},
        {"params": rest, "lr": 1e-3, "weight_decay": 0.0},
    ]


def start(script: Script, world_size: int, seed: int) -> Any:
    """The DeepSpeed engine, with initial weights from `seed`."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiling it would take a minute
    torch.manual_seed(seed)
    model = Net()
    model.offset.fill_(0.1 * seed)
    if script.frozen:
        model.second.weight.requires_grad_(False)
        model.norm.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(parameter_groups(model, script.groups), betas=(0.9, 0.95))
    scheduler = None
    if script.with_scheduler:
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    config = {
        "train_micro_batch_size_per_gpu": NUM_ROWS // world_size,
        "zero_optimization": {"stage": script.stage, **script.config.get("zero_optimization", {})},
        "bf16": {"enabled": script.dtype == "bf16"},
        **{key: value for key, value in script.config.items() if key != "zero_optimization"},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def train(
    topology: Any,
    script: Script,
    steps: tuple[int, int],
    load_from: str | None = None,
    save_to: str | None = None,
) -> dict[str, Any]:
    """Run steps [first, last) of one training, and save before the middle one.

    A script that loads starts from other weights, so that a state that it does not load is noticed. Returns
    the losses, and the whole state as this rank gathers it after loading and when saving.
    """
    seed = script.seed or (1 if load_from is None else 7)
    engine = start(script, topology.world_size, seed)
    result: dict[str, Any] = {"losses": []}
    if load_from is not None:
        path, result["client_state"] = engine.load_checkpoint(load_from)
        assert path is not None, f"nothing was loaded from {load_from}"
        assert engine.global_steps == steps[0]
        result["loaded"] = whole_state(engine, script)
    middle = (steps[0] + steps[1]) // 2
    for step in range(*steps):
        if save_to is not None and step == middle:
            engine.save_checkpoint(save_to, client_state={"epoch": 4, "noise": torch.ones(2)})
            result["saved"] = whole_state(engine, script)
            result["updates"] = updates(engine, script)
        result["losses"].append(_step(engine, topology, step))
        if step == 0:
            _advance_second_group(engine, script)
    return result


def _step(engine: Any, topology: Any, step: int) -> float:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, VOCAB_SIZE, (NUM_ROWS, SEQ_LEN + 1), generator=generator)
    mine = rows[topology.rank :: topology.world_size]
    logits = engine(mine[:, :-1]).float()
    loss = cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
    engine.backward(loss)
    engine.step()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return float(total / topology.world_size)


def _flat_of_groups(engine: Any, script: Script) -> list[list[Tensor]]:
    """The tensors that the inner optimizer updates, by group."""
    if script.stage == 3:
        flats: list[list[Tensor]] = [[] for _ in engine.optimizer.optimizer.param_groups]
        for i, flat in enumerate(engine.optimizer.fp32_partitioned_groups_flat):
            flats[engine.optimizer.sub_group_to_group_id[i]].append(flat)
        return flats
    return [group["params"] for group in _inner(engine).param_groups]


def _inner(engine: Any) -> Any:
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _advance_second_group(engine: Any, script: Script) -> None:
    """Add three updates to the counts of all groups but the first, so that the groups differ."""
    for flat in [flat for group in _flat_of_groups(engine, script)[1:] for flat in group]:
        _inner(engine).state[flat]["step"] += 3


def updates(engine: Any, script: Script) -> list[int]:
    """The optimizer's update counts, by group."""
    state = _inner(engine).state
    return [int(state[group[0]]["step"]) for group in _flat_of_groups(engine, script)]


def whole_state(engine: Any, script: Script) -> dict[tuple[str, str], Tensor]:
    """Every weight, moment, frozen parameter and buffer, from DeepSpeed's own functions."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if script.stage in (1, 2) and _inner(engine).state:
        # After its first step, DeepSpeed links the moments of the first group only.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[tuple[str, str], Tensor] = {}
    masters = _masters(engine) if script.stage == 0 else {}
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            with deepspeed.zero.GatheredParameters([param]) if script.stage == 3 else torch.no_grad():
                found[name, "weight"] = param.detach().clone()
        elif script.stage == 0:
            master = masters.get(id(param), param)
            found[name, "weight"] = master.detach().clone()
            found |= {
                (name, moment): _inner(engine).state[master][moment].clone()
                for moment in ("exp_avg", "exp_avg_sq")
            }
        else:
            found[name, "weight"] = safe_get_full_fp32_param(param).clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                found[name, moment] = safe_get_full_optimizer_state(param, moment).clone()
    found |= {(name, "weight"): buffer.clone() for name, buffer in engine.module.named_buffers()}
    return found


def _masters(engine: Any) -> dict[int, Tensor]:
    """Stage 0: the fp32 master weight of each 16-bit parameter, by the parameter's id."""
    if _inner(engine) is engine.optimizer:
        return {}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def save_after_steps(
    topology: Any, script: Script, save_to: str, steps: tuple[int, ...], exclude_frozen: bool = False
) -> None:
    """Train, and save a tag after each of `steps`."""
    engine = start(script, topology.world_size, script.seed or 1)
    for step in range(max(steps)):
        _step(engine, topology, step)
        if step + 1 in steps:
            engine.save_checkpoint(save_to, exclude_frozen_parameters=exclude_frozen)
