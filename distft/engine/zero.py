"""The DeepSpeed ZeRO engine, stages 0 to 3; implements the `Engine` interface."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from distft.checkpoint.fragments import WEIGHT, Fragment, even_slice
from distft.checkpoint.sources import StateSource, read_state
from distft.collectives import Collectives, all_or_none
from distft.config.step_function import value_at
from distft.data.batch import AnyBatch
from distft.engine import zero_layout
from distft.engine.deepspeed_config import ZeroConfig, clips_in_kernel, deepspeed_config
from distft.engine.deepspeed_import import deepspeed
from distft.engine.interface import DTYPES, GroupLr, LossTermsFn, UpdateResult
from distft.engine.memory import allocate
from distft.engine.moved_parameters import MovedParameters
from distft.engine.node import read_in_shares, read_once_per_node
from distft.engine.original_weights import OriginalWeights
from distft.engine.quantized_weights import QuantizedWeights
from distft.engine.shared_matrices import SharedMatrices
from distft.engine.stage3_blocks import free_weights_until_backward, gather_by_block
from distft.engine.weight_average import WeightAverage, replaced_values
from distft.errors import CheckpointError
from distft.model.block import Block
from distft.optim.groups import ParameterGroup
from distft.optim.kernels import FlatOptimizer, set_clip_and_skip
from distft.optim.segments import MasterSlice, SegmentedOptimizer
from distft.optim.settings import OptimizerSettings
from distft.topology import BatchPlan

_SUMMED_NUMEL = 1 << 26  # elements of one sum over ranks, which takes as much memory once more


class ZeroEngine:
    """A DeepSpeed engine at stage 0, 1, 2 or 3."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        *,
        settings: ZeroConfig,
        optim: OptimizerSettings,
        plan: BatchPlan,
        collectives: Collectives,
        device: torch.device,
    ) -> None:
        """`module` is on the meta device, with `requires_grad` set; `load_fragments` gives it its weights.

        A process group must exist, also for a single rank.
        """
        zero_layout.check_version()
        zero_layout.skip_jit_builds()
        _silence_step_logs()
        self.device = device
        self.module = module
        self._stage = settings.zero_stage
        self._collectives = collectives
        self._max_grad_norm = optim.max_grad_norm
        self._ema_decay = optim.ema_decay
        self._average: WeightAverage | None = None
        self._loss_scale = torch.ones((), device=device)
        self._clips_in_kernel = clips_in_kernel(settings)
        config = deepspeed_config(
            settings, plan, is_cuda=device.type == "cuda", max_grad_norm=optim.max_grad_norm
        )
        dtype = DTYPES[settings.param_dtype]
        self._moved = MovedParameters(module, device)
        self._originals = OriginalWeights()
        self._quantized = QuantizedWeights(module, settings.frozen_bits, device, dtype)
        if self._stage == 3:
            zero_layout.allocate_stage3(module, config, device, dtype)
        else:
            allocate(module, device, dtype)
        self._params = dict(module.named_parameters())
        self._head_params = self._trainable_of_heads()
        zero_layout.accept_optimizer(FlatOptimizer)
        # One group for DeepSpeed, in which those of `groups` lie one behind the other.
        flat_optimizer = FlatOptimizer([self._params[name] for group in groups for name in group.names])
        with redirect_stdout(StringIO()):  # DeepSpeed prints memory statistics at any log level
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=flat_optimizer,
                config=config,
                dist_init_required=False,
            )
        slices = list(zero_layout.master_slices(self._engine, self._stage, self._params))
        self._optimizer = SegmentedOptimizer(slices, groups, optim)
        self._share_matrices(slices, groups)
        flat_optimizer.update = self._optimizer.update
        if self._clips_in_kernel and self._stage > 0:
            zero_layout.update_without_waiting(self._engine)
        if self._stage == 3:
            self._gather_by_block(settings)

    def _trainable_of_heads(self) -> list[nn.Parameter]:
        """A step may not use some of several heads; all else takes part in every forward."""
        heads = tuple(f"{name}." for name in getattr(self.module, "heads", ()))
        return [p for name, p in self._params.items() if p.requires_grad and name.startswith(heads)]

    def _gather_by_block(self, settings: ZeroConfig) -> None:
        blocks = [layer for layer in self.module.modules() if isinstance(layer, Block)]
        gather_by_block(blocks)
        for block in blocks:
            if settings.activation_checkpointing == "none" and block.compiled_train is None:
                free_weights_until_backward(block)

    def _share_matrices(self, slices: Sequence[MasterSlice], groups: Sequence[ParameterGroup]) -> None:
        """Let an optimizer that needs whole matrices have them."""
        by_matrix = {name for group in groups if group.rule.is_by_matrix for name in group.names}
        if by_matrix and self._stage > 0 and self._collectives.dp_world_size > 1:
            shapes = {
                name: tuple(getattr(param, "ds_shape", param.shape))
                for name, param in self._params.items()
                if name in by_matrix
            }
            self._optimizer.kernel.replace_matrices = SharedMatrices(  # type: ignore[attr-defined]
                slices, shapes, self._collectives, self.device
            )

    def model(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def forward_backward(self, micro_batches: Sequence[AnyBatch], loss_terms: LossTermsFn) -> Tensor:
        total = None
        if self._stage > 0:
            zero_layout.clear_gradients(self._engine, self._stage, self._head_params)
        # ZeRO averages gradients over ranks; the Engine contract is that they add.
        factor = float(self._collectives.dp_world_size)
        # DeepSpeed multiplies by the loss scale that it has been told, at the other stages than 0.
        scale = self._loss_scale if self._clips_in_kernel or self._stage == 0 else 1.0
        for index, batch in enumerate(micro_batches):
            # DeepSpeed reduces gradients over ranks in the backward of the last micro-batch.
            self._engine.set_gradient_accumulation_boundary(index + 1 == len(micro_batches))
            terms = loss_terms(self.model, batch.to(self.device))
            self._engine.backward(terms.sum() * factor * scale, scale_wrt_gas=False)
            total = terms.detach() if total is None else total + terms.detach()
        assert total is not None
        return total

    def set_loss_scale(self, scale: Tensor) -> None:
        self._loss_scale = scale
        if not self._clips_in_kernel:  # DeepSpeed divides by it, on the host, where it waits anyway
            zero_layout.set_loss_scale(self._engine, self._stage, float(scale))

    def step(self, group_lr: GroupLr) -> UpdateResult:
        self._optimizer.set_lr(group_lr)
        update = self._update_by_kernel() if self._clips_in_kernel else self._update_by_wrapper()
        if self._average is not None:
            self._average.update(update.is_skipped)
        return update

    def _update_by_wrapper(self) -> UpdateResult:
        """DeepSpeed clips and skips, which waits for the device."""
        self._engine.step()
        grad_norm = self._on_device(zero_layout.last_grad_norm(self._engine))
        if self._stage == 0:  # unlike at the other stages, DeepSpeed reports the norm of the scaled gradients
            grad_norm = grad_norm / self._loss_scale
        return UpdateResult(grad_norm, self._on_device(float(self._engine.optimizer.overflow)))

    def _on_device(self, number: Any) -> Tensor:
        """A tensor or a number of Python in fp32. `torch.tensor(number, device=...)` would wait for a GPU."""
        if isinstance(number, Tensor):
            return number.to(device=self.device, dtype=torch.float32)
        return torch.full((), float(number), device=self.device)

    def _update_by_kernel(self) -> UpdateResult:
        """The optimizer's kernel clips and skips: no pass over the gradients, and nothing waits."""
        if self._stage == 0:
            grad_norm = torch.nn.utils.get_total_norm(
                p.grad for p in self._params.values() if p.grad is not None
            )
        else:
            grad_norm = zero_layout.gradient_norm(self._engine) / self._loss_scale
        is_skipped = set_clip_and_skip(
            self._optimizer.kernel,
            grad_norm,
            loss_scale=self._loss_scale,
            max_grad_norm=self._max_grad_norm,
        )
        self._engine.step()
        return UpdateResult(grad_norm, is_skipped)

    def set_ema_decay(self, decay: float) -> None:
        assert self._average is not None
        self._average.decay = decay

    def add_to_parameters(self, deltas: Mapping[str, Tensor]) -> None:
        for name, values in self._moved.add(deltas).items():
            if self._stage == 3:
                zero_layout.write_stage3_weights(self._engine, self._params[name], values)
            else:
                self._params[name].detach().copy_(values)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        assert self._average is not None
        if self._stage == 3:
            values = {average.parameter: average.values for average in self._average.fragments()}
            with zero_layout.replaced_stage3_weights(self._engine, self._params, values):
                yield
        else:
            with replaced_values(self._params, self._whole_averages(self._average)):
                yield

    def _whole_averages(self, average: WeightAverage) -> dict[str, Tensor]:
        """Stages 0 to 2: the average of each whole trainable parameter, as the model computes with it."""
        trainable = {name: param for name, param in self._params.items() if param.requires_grad}
        dtype = next(iter(self._params.values())).dtype
        sizes = [param.numel() for param in trainable.values()]
        flat = torch.zeros(sum(sizes), dtype=dtype, device=self.device)
        whole = dict(zip(trainable, torch.split(flat, sizes), strict=True))
        for own in average.fragments():
            whole[own.parameter][own.start : own.start + own.values.numel()].copy_(own.values)
        if self._stage > 0:
            # Each element is on one rank and zero on the others, so the sum is exact in any dtype.
            for chunk in torch.split(flat, _SUMMED_NUMEL):
                chunk.copy_(self._collectives.all_reduce_sum(chunk))
        return whole

    def all_reduce_sum(self, value: Tensor) -> Tensor:
        return self._collectives.all_reduce_sum(value)

    def fragments(self) -> Iterator[Fragment]:
        for own, moments, _ in self._optimizer.states():
            # At stage 0 every rank has the same whole parameters, so each saves an even slice of them.
            begin, end = self._even_slice(own.numel) if self._stage == 0 else (0, own.numel)
            start = own.start + begin
            yield Fragment(own.parameter, WEIGHT, start, own.values[begin:end])
            for moment, values in moments.items():
                yield Fragment(own.parameter, moment, start, values[begin:end])
        for whole in () if self._average is None else self._average.fragments():
            numel = whole.values.numel()
            begin, end = self._even_slice(numel) if self._stage == 0 else (0, numel)
            yield Fragment(whole.parameter, whole.state, whole.start + begin, whole.values[begin:end])
        ranks = self._collectives.dp_rank, self._collectives.dp_world_size
        yield from self._moved.fragments(*ranks)
        yield from self._quantized.fragments(self._originals, *ranks)
        for name, param in self._params.items():
            if param.requires_grad or name in self._moved.values:
                continue
            if self._stage == 3:
                start, values = zero_layout.stage3_weights(self._engine, param)
            else:
                start, stop = self._even_slice(param.numel())
                values = param.detach().view(-1)[start:stop]
            yield self._originals.held(name, start, values)

    def _even_slice(self, numel: int) -> tuple[int, int]:
        return even_slice(numel, self._collectives.dp_rank, self._collectives.dp_world_size)

    def updates(self) -> dict[str, int]:
        """Update counts by parameter, equal on every rank: ranks exchange them, as each has only some."""
        local = {own.parameter: int(updates) for own, _, updates in self._optimizer.states()}
        return {name: n for counts in self._collectives.all_gather(local) for name, n in counts.items()}

    def load_fragments(self, source: StateSource) -> None:
        self._originals.load(source)
        self._moved.load(source)
        with all_or_none(self._collectives, CheckpointError):
            self._quantized.load(source)
        if self._ema_decay is not None:
            slices = [own for own, _, _ in self._optimizer.states()]
            self._average = WeightAverage(value_at(self._ema_decay, 0), slices)
        if self._stage < 3:
            read_once_per_node(source, self._states_on_every_rank(), self._collectives)
        else:
            self._load_stage3_weights(source)
        if self._stage > 0:  # at stage 0 every rank has all of it
            for own, moments, _ in self._optimizer.states():
                read_state(source, own.parameter, WEIGHT, own.values, own.start)
                for moment, values in moments.items():
                    read_state(source, own.parameter, moment, values, own.start)
            if self._average is not None:
                self._average.load(source)

    def _states_on_every_rank(self) -> list[Fragment]:
        """Stages 0 to 2: the weights that the model computes with; at stage 0 all else, too."""
        states = [Fragment(name, WEIGHT, 0, p.detach().view(-1)) for name, p in self._params.items()]
        if self._stage > 0:
            return states
        for own, moments, _ in self._optimizer.states():
            if own.flat.dtype != self._params[own.parameter].dtype:
                states.append(Fragment(own.parameter, WEIGHT, 0, own.values))
            states += [Fragment(own.parameter, name, 0, values) for name, values in moments.items()]
        return states if self._average is None else [*states, *self._average.fragments()]

    def _load_stage3_weights(self, source: StateSource) -> None:
        with all_or_none(self._collectives, CheckpointError):
            for name, param in self._params.items():
                start, values = zero_layout.stage3_weights(self._engine, param)
                read_state(source, name, WEIGHT, values, start)
        whole = [
            Fragment(name, WEIGHT, 0, param.detach().view(-1))
            for name, param in self._params.items()
            if zero_layout.is_gathered(param)
        ]
        read_in_shares(source, whole, self._collectives)

    def close(self) -> None:
        self._engine.destroy()
        self._optimizer.close()


def _silence_step_logs() -> None:
    """DeepSpeed logs every step on every rank; failures raise, and distft reports the metrics."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
