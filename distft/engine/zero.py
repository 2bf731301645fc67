"""DeepSpeed ZeRO behind our Engine: gradients add, the learning rate is handed in, state is fragments."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from distft.checkpoint.fragments import WEIGHT, Fragment, even_share
from distft.checkpoint.sources import StateSource, read_state
from distft.collectives import Collectives
from distft.engine import zero_layout
from distft.engine.deepspeed_config import ZeroConfig, deepspeed_config
from distft.engine.interface import DTYPES, UpdateResult
from distft.engine.memory import allocate
from distft.optim.adamw import AdamWConfig
from distft.optim.groups import ParameterGroup
from distft.topology import BatchPlan


class ZeroEngine:
    """A DeepSpeed engine at stage 0, 1, 2 or 3."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        settings: ZeroConfig,
        optim: AdamWConfig,
        plan: BatchPlan,
        collectives: Collectives,
        device: torch.device,
    ) -> None:
        """`module` is on the meta device, with `requires_grad` set; its weights come by `load_fragments`.

        A process group must exist, also for a single rank.
        """
        zero_layout.check_version()
        zero_layout.skip_jit_builds()
        _quieten()
        self.device = device
        self.module = module
        self._settings = settings
        self._stage = settings.zero_stage
        self._collectives = collectives
        self._groups = list(groups)
        self._max_grad_norm = optim.max_grad_norm
        self._loss_scale = 1.0
        self._shapes = {name: param.shape for name, param in module.named_parameters()}
        config = deepspeed_config(settings, plan, max_grad_norm=optim.max_grad_norm)
        dtype = DTYPES[settings.param_dtype]
        if self._stage == 3:
            zero_layout.allocate_sliced(module, config, device, dtype)
        else:
            allocate(module, device, dtype)
        self._params = dict(module.named_parameters())
        with redirect_stdout(StringIO()):  # DeepSpeed prints its memory statistics, whatever the log level
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=self._adamw(optim), config=config, dist_init_required=False
            )

    def _adamw(self, optim: AdamWConfig) -> torch.optim.AdamW:
        groups = [
            {
                "params": [self._params[name] for name in group.names],
                "weight_decay": group.weight_decay,
                "lr_scale": group.lr_scale,
            }
            for group in self._groups
        ]
        return torch.optim.AdamW(groups, lr=optim.peak_lr, betas=optim.betas, eps=optim.eps, fused=True)

    def model(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    @contextmanager
    def micro_step(self, *, is_last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> Tensor:
        # ZeRO averages gradients over ranks; the Engine contract is that they add.
        self._engine.backward(loss * self._collectives.world_size, scale_wrt_gas=False)
        return loss.detach()

    def set_loss_scale(self, scale: float) -> None:
        self._loss_scale = scale
        zero_layout.set_loss_scale(self._engine, self._stage, scale)

    def step(self, lr: float) -> UpdateResult:
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if optimizer is zero_layout.inner_optimizer(self._engine):
            return self._step_unwrapped()
        self._engine.step()
        norm = torch.as_tensor(optimizer._global_grad_norm, dtype=torch.float32, device=self.device)
        if self._stage == 0:
            norm = norm / self._loss_scale
        return UpdateResult(norm, torch.tensor(float(optimizer.overflow), device=self.device))

    def _step_unwrapped(self) -> UpdateResult:
        """Stage 0 in fp32: DeepSpeed sums the gradients; clipping and skipping are left to us."""
        gradients = [p.grad for p in self._params.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        is_skipped = not bool(torch.isfinite(norm))
        if is_skipped:
            self._engine.zero_grad()
            for param in self._params.values():
                param.grad = None
        else:
            if self._max_grad_norm is not None:
                factor = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_(gradients, factor)
            self._engine.step()
        return UpdateResult(norm, torch.tensor(float(is_skipped), device=self.device))

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        return self._collectives.all_reduce_sum(value)

    def fragments(self) -> Iterator[Fragment]:
        for part in zero_layout.held(self._engine, self._stage, self._params):
            begin, end = self._written(part.master.numel())
            start = part.start + begin
            yield Fragment(part.parameter, WEIGHT, start, part.master[begin:end])
            for moment, values in part.moments.items():
                yield Fragment(part.parameter, moment, start, values[begin:end])
        for name, param in self._params.items():
            if param.requires_grad:
                continue
            if self._stage == 3:
                start, values = zero_layout.low_precision_slice(self._engine, param)
            else:
                start, stop = even_share(param.numel(), self._collectives.rank, self._collectives.world_size)
                values = param.detach().view(-1)[start:stop]
            yield Fragment(name, WEIGHT, start, values)

    def _written(self, numel: int) -> tuple[int, int]:
        """What this rank writes of the elements that it holds: at stage 0 all ranks hold the same."""
        if self._stage > 0:
            return 0, numel
        return even_share(numel, self._collectives.rank, self._collectives.world_size)

    def updates(self) -> dict[str, int]:
        """The same on every rank, although a rank may hold nothing of a parameter."""
        mine = {
            part.parameter: int(part.updates)
            for part in zero_layout.held(self._engine, self._stage, self._params)
        }
        return {name: n for theirs in self._collectives.all_gather(mine) for name, n in theirs.items()}

    def load_fragments(self, source: StateSource) -> None:
        # A group's parameters have had equally many updates: that is how groups are made.
        zero_layout.create_optimizer_state(self._engine, self._stage, [g.updates for g in self._groups])
        for name, param in self._params.items():
            if self._stage == 3:
                start, values = zero_layout.low_precision_slice(self._engine, param)
                read_state(source, name, WEIGHT, values, start)
                if zero_layout.is_gathered(param):
                    read_state(source, name, WEIGHT, param.detach().view(-1), 0)
            else:
                read_state(source, name, WEIGHT, param.detach().view(-1), 0)
        for part in zero_layout.held(self._engine, self._stage, self._params):
            read_state(source, part.parameter, WEIGHT, part.master, part.start)
            for moment, values in part.moments.items():
                read_state(source, part.parameter, moment, values, part.start)

    def close(self) -> None:
        self._engine.destroy()


def _quieten() -> None:
    """DeepSpeed tells of every step on every rank; what matters raises, or is a metric of ours."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
