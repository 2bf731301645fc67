"""The single-process engine in plain torch: for laptops and tests, and the reference for ZeRO."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.sources import StateSource, read_state
from distft.config.step_function import value_at
from distft.data.batch import AnyBatch
from distft.engine.interface import DTYPES, GroupLr, LossTermsFn, UpdateResult
from distft.engine.memory import allocate
from distft.engine.moved_parameters import MovedParameters
from distft.engine.original_weights import OriginalWeights
from distft.engine.quantized_weights import QuantizedWeights
from distft.engine.settings import LocalConfig
from distft.engine.weight_average import WeightAverage, replaced_values
from distft.optim.groups import ParameterGroup
from distft.optim.kernels import set_clip_and_skip
from distft.optim.segments import MasterSlice, SegmentedOptimizer
from distft.optim.settings import OptimizerSettings


class LocalEngine:
    """An optimizer over fp32 master weights; the model computes in `param_dtype`.

    In fp32 the master weights are the model's own parameters. Otherwise the backward adds each gradient to
    its master's fp32 gradient as soon as it is complete, so accumulation does not round to bf16 or fp16.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        settings: LocalConfig,
        optim: OptimizerSettings,
        device: torch.device,
    ) -> None:
        """`module` is on the meta device, with `requires_grad` set; `load_fragments` gives it its weights."""
        self.device = device
        self.module = module
        self._max_grad_norm = optim.max_grad_norm
        self._dtype = DTYPES[settings.param_dtype]
        self._loss_scale: Tensor | None = None  # fp16 only
        self._moved = MovedParameters(module, device)
        self._originals = OriginalWeights()
        self._quantized = QuantizedWeights(module, settings.frozen_bits, device, self._dtype)
        allocate(module, device, self._dtype)
        self._params = dict(module.named_parameters())
        self._masters = {name: self._make_master(name) for group in groups for name in group.names}
        slices = [
            MasterSlice(name, tuple(master.shape), 0, master, 0, master.numel())
            for name, master in self._masters.items()
        ]
        self._optimizer = SegmentedOptimizer(slices, groups, optim)
        self._average: WeightAverage | None = None
        if optim.ema_decay is not None:
            self._average = WeightAverage(value_at(optim.ema_decay, 0), slices)

    def _make_master(self, name: str) -> Tensor:
        param = self._params[name]
        if param.dtype == torch.float32:
            return param
        master = torch.empty(param.shape, dtype=torch.float32, device=self.device, requires_grad=True)

        def move_gradient_to_master(low_precision: Tensor) -> None:
            # Clearing the gradient here frees it, so only one low-precision gradient exists at a time.
            gradient, low_precision.grad = low_precision.grad, None
            if gradient is None:
                return
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad.add_(gradient)

        param.register_post_accumulate_grad_hook(move_gradient_to_master)  # type: ignore[no-untyped-call]
        return master

    def model(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def forward_backward(self, micro_batches: Sequence[AnyBatch], loss_terms: LossTermsFn) -> Tensor:
        total = None
        for batch in micro_batches:
            terms = loss_terms(self.model, batch.to(self.device))
            loss = terms.sum()
            torch.autograd.backward(loss if self._loss_scale is None else loss * self._loss_scale)
            total = terms.detach() if total is None else total + terms.detach()
        assert total is not None
        return total

    def set_loss_scale(self, scale: Tensor) -> None:
        self._loss_scale = scale

    def step(self, group_lr: GroupLr) -> UpdateResult:
        for master in self._masters.values():
            if master.grad is None:  # of a head that no term of this step uses
                master.grad = torch.zeros_like(master)
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
        if self._loss_scale is not None:
            grad_norm = grad_norm / self._loss_scale
        is_skipped = set_clip_and_skip(
            self._optimizer.kernel, grad_norm, loss_scale=self._loss_scale, max_grad_norm=self._max_grad_norm
        )
        self._optimizer.set_lr(group_lr)
        self._optimizer.update(self._masters.values())
        for master in self._masters.values():
            master.grad = None
        self._copy_masters_to_model()
        if self._average is not None:
            self._average.update(is_skipped)
        return UpdateResult(grad_norm, is_skipped)

    def set_ema_decay(self, decay: float) -> None:
        assert self._average is not None
        self._average.decay = decay

    def add_to_parameters(self, deltas: Mapping[str, Tensor]) -> None:
        for name, values in self._moved.add(deltas).items():
            self._params[name].detach().copy_(values)

    def averaged_weights(self) -> AbstractContextManager[None]:
        assert self._average is not None
        averages = {average.parameter: average.values for average in self._average.fragments()}
        return replaced_values(
            self._params, {name: values.to(self._dtype) for name, values in averages.items()}
        )

    def _copy_masters_to_model(self) -> None:
        if self._dtype == torch.float32 or not self._masters:
            return
        with torch.no_grad():
            low_precision: list[Tensor] = [self._params[name] for name in self._masters]
            torch._foreach_copy_(low_precision, list(self._masters.values()))

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        return value

    def fragments(self) -> Iterator[Fragment]:
        yield from self._moved.fragments()
        for name, param in self._params.items():
            if name not in self._masters and name not in self._moved.values:
                yield self._originals.held(name, 0, param.detach().view(-1))
        yield from self._quantized.fragments(self._originals)
        for own, moments, _ in self._optimizer.states():
            yield Fragment(own.parameter, WEIGHT, 0, own.values)
            for moment, values in moments.items():
                yield Fragment(own.parameter, moment, 0, values)
        if self._average is not None:
            yield from self._average.fragments()

    def updates(self) -> dict[str, int]:
        return {own.parameter: int(updates) for own, _, updates in self._optimizer.states()}

    def load_fragments(self, source: StateSource) -> None:
        self._originals.load(source)
        self._moved.load(source)
        self._quantized.load(source)
        for name, param in self._params.items():
            if name not in self._masters:
                read_state(source, name, WEIGHT, param.detach().view(-1), 0)
        for own, moments, _ in self._optimizer.states():
            read_state(source, own.parameter, WEIGHT, own.values, 0)
            for moment, values in moments.items():
                read_state(source, own.parameter, moment, values, 0)
        if self._average is not None:
            self._average.load(source)
        self._copy_masters_to_model()

    def close(self) -> None:
        self._optimizer.close()
