"""The plain engine: one process, torch alone. For laptops and tests, and what ZeRO must agree with."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distft.checkpoint.fragments import MOMENTS, WEIGHT, Fragment
from distft.checkpoint.sources import StateSource, read_state
from distft.engine.interface import DTYPES, EngineSettings, UpdateResult
from distft.engine.memory import allocate
from distft.optim.adamw import AdamWConfig
from distft.optim.groups import ParameterGroup


class LocalConfig(EngineSettings):
    """One process with everything in it."""

    type: Literal["local"] = "local"


class LocalEngine:
    """AdamW over fp32 master weights; the model computes in `param_dtype`.

    In fp32 the masters are the model's own parameters. Otherwise each gradient is added to its master's
    fp32 gradient as soon as the backward has made it, so accumulation loses nothing to bf16 or fp16.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        settings: LocalConfig,
        optim: AdamWConfig,
        device: torch.device,
    ) -> None:
        """`module` is on the meta device, with `requires_grad` set; its weights come by `load_fragments`."""
        self.device = device
        self.module = module
        self._max_grad_norm = optim.max_grad_norm
        self._dtype = DTYPES[settings.param_dtype]
        self._loss_scale = 1.0
        allocate(module, device, self._dtype)
        self._params = dict(module.named_parameters())
        self._masters = {name: self._master(name) for group in groups for name in group.names}
        self._groups = list(groups)
        self._optimizer = torch.optim.AdamW(
            [
                {
                    "params": [self._masters[name] for name in group.names],
                    "weight_decay": group.weight_decay,
                    "lr_scale": group.lr_scale,
                }
                for group in groups
            ],
            lr=optim.peak_lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,
        )

    def _master(self, name: str) -> Tensor:
        param = self._params[name]
        if param.dtype == torch.float32:
            return param
        master = torch.empty(param.shape, dtype=torch.float32, device=self.device, requires_grad=True)

        def add_gradient(low: Tensor) -> None:
            gradient, low.grad = low.grad, None
            if gradient is None:
                return
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad.add_(gradient)

        param.register_post_accumulate_grad_hook(add_gradient)  # type: ignore[no-untyped-call]
        return master

    def model(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def micro_step(self, *, is_last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    def backward(self, loss: Tensor) -> Tensor:
        scaled = loss * self._loss_scale if self._loss_scale != 1.0 else loss
        torch.autograd.backward(scaled)
        return loss.detach()

    def set_loss_scale(self, scale: float) -> None:
        self._loss_scale = scale

    def step(self, lr: float) -> UpdateResult:
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients) / self._loss_scale
        divisor = torch.full_like(grad_norm, self._loss_scale)
        if self._max_grad_norm is not None:
            divisor = divisor * ((grad_norm + 1e-6) / self._max_grad_norm).clamp(min=1.0)
        is_skipped = (~torch.isfinite(grad_norm)).float()
        # The fused kernel divides by `grad_scale` and leaves everything alone where `found_inf` is 1: no
        # pass over the gradients for clipping, and no wait for the device to decide about a skip.
        self._optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        self._optimizer.found_inf = is_skipped  # type: ignore[attr-defined]
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._refresh()
        return UpdateResult(grad_norm, is_skipped)

    def _refresh(self) -> None:
        if self._dtype == torch.float32 or not self._masters:
            return
        with torch.no_grad():
            low: list[Tensor] = [self._params[name] for name in self._masters]
            torch._foreach_copy_(low, list(self._masters.values()))

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        return value

    def fragments(self) -> Iterator[Fragment]:
        for name, param in self._params.items():
            master = self._masters.get(name)
            yield Fragment(name, WEIGHT, 0, (param if master is None else master).detach().view(-1))
            if master is not None:
                state = self._optimizer.state[master]
                for moment in MOMENTS:
                    yield Fragment(name, moment, 0, state[moment].view(-1))

    def updates(self) -> dict[str, int]:
        return {name: int(self._optimizer.state[master]["step"]) for name, master in self._masters.items()}

    def load_fragments(self, source: StateSource) -> None:
        for name, param in self._params.items():
            if name not in self._masters:
                read_state(source, name, WEIGHT, param.detach().view(-1), 0)
        for name, master in self._masters.items():
            read_state(source, name, WEIGHT, master.detach().view(-1), 0)
            state = self._optimizer.state[master]
            state["step"] = torch.tensor(float(source.updates(name)), device=self.device)
            for moment in MOMENTS:
                state[moment] = torch.empty_like(master, requires_grad=False)
                read_state(source, name, moment, state[moment].view(-1), 0)
        self._refresh()

    def close(self) -> None:
        self._optimizer.state.clear()
