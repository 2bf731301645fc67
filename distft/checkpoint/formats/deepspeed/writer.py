"""Writes checkpoints that DeepSpeed's `engine.load_checkpoint` loads, for any ZeRO stage and world size."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distft import storage
from distft.checkpoint.formats.deepspeed.files import MODEL_FILE, optimizer_file, stage3_model_file
from distft.checkpoint.formats.deepspeed.layout import (
    DEFAULT_SUB_GROUP_SIZE,
    Span,
    stage3_spans,
    stage12_partition_numel,
    stage12_spans,
    sub_groups,
    with_offsets,
)
from distft.checkpoint.formats.deepspeed.model import PARAM_DTYPES
from distft.checkpoint.formats.deepspeed.writer_state import DEEPSPEED_VERSION, StateDictBuilder
from distft.checkpoint.formats.names import LATEST
from distft.checkpoint.formats.torch_file import write_torch_file
from distft.checkpoint.formats.torch_file.values import OpaqueObject
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.sources import CheckpointSource
from distft.errors import CheckpointError, ConfigError, ErrorCollector


def write_deepspeed(
    source: CheckpointSource,
    target: str,
    *,
    zero_stage: int,
    world_size: int,
    param_dtype: str,
    tag: str,
    on_progress: Callable[[int], None] = lambda _num_bytes: None,
    sub_group_size: int = DEFAULT_SUB_GROUP_SIZE,
) -> None:
    """Write `source` to `target`/`tag`, then the file `latest`.

    The script that loads it must have the source's parameter groups, one of torch's optimizers (or
    DeepSpeed's Adam, if the source was trained with it), `param_dtype` (fp32, bf16 or fp16) as the dtype it
    computes in and, at stage 3, `sub_group_size` as its zero_optimization.sub_group_size. If the manifest has
    no groups, one group contains all trainable parameters in the manifest's order. `on_progress` gets the
    number of bytes of each chunk written. Raises `ConfigError` for invalid settings and for a tag that
    exists, `CheckpointError` for a source that DeepSpeed cannot represent at this stage.
    """
    directory = storage.join(target, tag)
    _check(zero_stage, world_size, param_dtype, directory)
    builder = StateDictBuilder(source)
    content = _CheckpointContent(builder, zero_stage, world_size, PARAM_DTYPES[param_dtype], sub_group_size)
    for name, value in content.files():
        write_torch_file(storage.join(directory, name), value, on_progress=on_progress)
    storage.commit_bytes(storage.join(target, LATEST), tag.encode())


def _check(zero_stage: int, world_size: int, param_dtype: str, directory: str) -> None:
    errors = ErrorCollector()
    with errors.collect():
        if zero_stage not in range(4):
            raise ConfigError(f"zero_stage={zero_stage} is not a ZeRO stage: choose 0, 1, 2 or 3.")
    with errors.collect():
        if world_size < 1:
            raise ConfigError(f"world_size={world_size} is too small: it must be at least 1.")
    with errors.collect():
        if param_dtype not in PARAM_DTYPES:
            raise ConfigError(f"param_dtype={param_dtype!r} is not one of {', '.join(PARAM_DTYPES)}.")
    with errors.collect():
        if storage.list_names(directory):
            raise ConfigError(f"{directory} is not empty: give another tag, or remove its files.")
    errors.raise_if_any()


@dataclass(frozen=True, slots=True)
class _CheckpointContent:
    """Files of one DeepSpeed checkpoint. Tensors are read from the source only while they are written."""

    builder: StateDictBuilder
    zero_stage: int
    world_size: int
    param_dtype: torch.dtype
    sub_group_size: int

    def files(self) -> Iterator[tuple[str, Any]]:
        """Names and contents. Raises for an unsuitable source before it yields the first file."""
        files: list[tuple[str, Any]] = []
        is_bf16 = self.param_dtype == torch.bfloat16
        for rank in range(self.world_size if self.zero_stage else 0):
            optimizer = (
                self._stage3_optimizer(rank) if self.zero_stage == 3 else self._stage12_optimizer(rank)
            )
            content = {"optimizer_state_dict": optimizer, **self.builder.identity()}
            files.append((optimizer_file(rank, is_bf16=is_bf16), content))
        if self.zero_stage == 3:
            files += [(stage3_model_file(rank), self._model(rank)) for rank in range(self.world_size)]
        else:
            files.append((MODEL_FILE, self._model(0)))
        yield from files

    def _model(self, rank: int) -> dict[str, Any]:
        """Content of a model file: the module's state dict and the training progress."""
        is_zero, frozen = self.zero_stage > 0, self._frozen()
        module = self._module(frozen)
        has_frozen = bool(frozen) and self.zero_stage >= 2  # DeepSpeed, too, then writes None for both
        return self.builder.model_file(
            module,
            # DeepSpeed neither saves nor reads these at stage 0; distft finds the parameters' names in them.
            self._param_shapes(),
            world_size=self.world_size,
            optimizer=None if is_zero else self._stage0_optimizer(),
            frozen_param_shapes=self.builder.shapes(frozen) if has_frozen else None,
            shared_params=dict(self.builder.manifest.tied) if is_zero else None,
            frozen_param_fragments=self._frozen_fragments(frozen, module, rank) if has_frozen else None,
        )

    def _frozen(self) -> list[str]:
        records = self.builder.manifest.parameters.items()
        return [name for name, record in records if not record.trainable and not record.is_buffer]

    def _param_shapes(self) -> list[Any]:
        groups = self._sub_groups() if self.zero_stage == 3 else self._groups()
        return [self.builder.shapes(numels) for _, numels in groups]

    def _module(self, frozen: Sequence[str]) -> "OrderedDict[str, Any]":
        """The module's state dict. Parameters are empty at stage 3, as the ranks have them partitioned."""
        module: OrderedDict[str, Any] = OrderedDict()
        for name, record in self.builder.manifest.parameters.items():
            dtype = self.builder.module_dtype(name, self.param_dtype)
            is_partitioned = self.zero_stage == 3 and (record.trainable or name in frozen)
            module[name] = (
                torch.empty(0, dtype=dtype)
                if is_partitioned
                else self.builder.parameter_state(name, WEIGHT, dtype)
            )
        for name, kept in self.builder.manifest.tied.items():
            module[name] = module[kept]
        return module

    def _frozen_fragments(
        self, frozen: Sequence[str], module: Mapping[str, Any], rank: int
    ) -> "OrderedDict[str, Any]":
        """Frozen parameters: whole at stage 2, a rank's padded partition of each at stage 3."""
        if self.zero_stage == 2:
            return OrderedDict((name, module[name]) for name in frozen)
        fragments: OrderedDict[str, Any] = OrderedDict()
        for name, numel in self.builder.numels(frozen).items():
            spans = list(stage3_spans({name: numel}, rank, self.world_size))
            dtype = self.builder.module_dtype(name, self.param_dtype)
            fragments[name] = self.builder.flat_state(spans, WEIGHT, dtype)
        return fragments

    def _groups(self) -> list[tuple[int, dict[str, int]]]:
        """The number of each group, and the number of elements of each of its parameters."""
        return [(i, self.builder.numels(group.parameters)) for i, group in enumerate(self.builder.groups)]

    def _sub_groups(self) -> list[tuple[int, dict[str, int]]]:
        """The same for each sub-group of stage 3; the number is that of its group."""
        return [
            (number, members)
            for number, numels in self._groups()
            for members in sub_groups(numels, self.world_size, self.sub_group_size)
        ]

    def _moments(self, number: int, numels: Mapping[str, int], spans: Sequence[Span]) -> dict[str, Any]:
        updates, moments = self.builder.updates(list(numels)), self.builder.moments(numels)
        if not moments:
            return {}
        flat = {moment: self.builder.flat_state(spans, moment) for moment in moments}
        return {"step": self.builder.step(number, updates), **flat}

    def _stage12_optimizer(self, rank: int) -> dict[str, Any]:
        """Stages 1 and 2: a rank's partition of each group's flat buffer."""
        masters, paddings, addresses, moments = [], [], [], {}
        for number, numels in self._groups():
            size = stage12_partition_numel(numels, self.world_size)
            start, total = rank * size, sum(numels.values())
            end = max(min(start + size, total), start)
            spans = list(stage12_spans(numels, start, end))
            masters.append(self.builder.flat_state(spans, WEIGHT))
            addresses.append(_fragment_addresses(spans))
            paddings.append(start + size - end)
            padded = list(stage12_spans(numels, start, start + size))
            if found := self._moments(number, numels, padded):
                moments[number] = found
        count = len(masters)
        scaler = (
            {"loss_scaler": self.builder.loss_scaler(self.param_dtype), "dynamic_loss_scale": True}
            if self.param_dtype == torch.float16
            else {}  # DeepSpeed then uses the script's own
        )
        return {
            **scaler,
            "overflow": False,
            "base_optimizer_state": {
                "state": moments,
                "param_groups": [self.builder.param_group(number, [number]) for number in range(count)],
            },
            "single_partition_of_fp32_groups": masters,
            "zero_stage": self.zero_stage,
            "group_paddings": paddings,
            "partition_count": [self.world_size] * count,
            "param_slice_mappings": addresses,
            "ds_version": DEEPSPEED_VERSION,
        }

    def _stage3_optimizer(self, rank: int) -> dict[str, Any]:
        """Stage 3: a rank's partition of each parameter."""
        masters, moments = [], {}
        indices: list[list[int]] = [[] for _ in self.builder.groups]
        for index, (number, numels) in enumerate(self._sub_groups()):
            spans = list(stage3_spans(numels, rank, self.world_size))
            masters.append(self.builder.flat_state(spans, WEIGHT))
            indices[number].append(index)
            if found := self._moments(number, numels, spans):
                moments[index] = found
        return {
            "zero_stage": self.zero_stage,
            "loss_scaler": self.builder.loss_scaler(self.param_dtype),
            "dynamic_loss_scale": self.param_dtype == torch.float16,
            "overflow": False,
            "partition_count": self.world_size,
            "optimizer_state_dict": {
                "state": moments,
                "param_groups": [self.builder.param_group(i, members) for i, members in enumerate(indices)],
            },
            "fp32_flat_groups": masters,
        }

    def _stage0_optimizer(self) -> dict[str, Any]:
        """Stage 0: the optimizer's own state dict; DeepSpeed wraps it if the script computes in 16 bits."""
        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        index = 0
        for number, group in enumerate(self.builder.groups):
            first = index
            for name in group.parameters:
                updates = self.builder.manifest.parameters[name].updates
                moments = self.builder.moments([name])
                if moments:
                    tensors = {
                        moment: self.builder.parameter_state(name, moment, torch.float32)
                        for moment in moments
                    }
                    states[index] = {"step": self.builder.step(number, updates), **tensors}
                index += 1
            groups.append(self.builder.param_group(number, range(first, index)))
        inner = {"state": states, "param_groups": groups}
        if self.param_dtype == torch.float32:
            return inner
        if any("bias_correction" in group for group in groups):
            raise CheckpointError(
                f"{self.builder.source.path} was trained with DeepSpeed's own Adam, and distft does not "
                "write its layout of stage 0 in 16 bits. Choose --zero-stage 1 or --dtype fp32."
            )
        is_dynamic = self.param_dtype == torch.float16
        scale = self.builder.loss_scale_fields()
        static = {"cur_scale": 1.0, "cur_iter": scale["cur_iter"]}
        return {
            "dynamic_loss_scale": is_dynamic,
            **(scale if is_dynamic else static),
            "optimizer_state_dict": inner,
            "fp32_groups": [
                [self.builder.parameter_state(name, WEIGHT, torch.float32) for name in group.parameters]
                for group in self.builder.groups
            ],
        }


def _fragment_addresses(spans: Sequence[Span]) -> "OrderedDict[str, OpaqueObject]":
    """Where each parameter lies in a rank's flat partition; ds_to_universal reads these."""
    addresses: OrderedDict[str, OpaqueObject] = OrderedDict()
    for name, span, offset in with_offsets(spans):
        fields = {"numel": span.numel, "start": offset}
        addresses[name] = OpaqueObject("deepspeed.utils.tensor_fragment", "fragment_address", fields)
    return addresses
