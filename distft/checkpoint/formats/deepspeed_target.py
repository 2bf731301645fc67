"""Checkpoints that plain DeepSpeed's `engine.load_checkpoint` loads, at any stage and number of ranks."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distft import storage
from distft.checkpoint.formats.deepspeed_files import LATEST, MODEL_FILE, optimizer_file, sliced_model_file
from distft.checkpoint.formats.deepspeed_layout import (
    SUB_GROUP_NUMEL,
    Run,
    flat_partition_numel,
    flat_runs,
    sliced_runs,
    sub_groups,
)
from distft.checkpoint.formats.deepspeed_model import PARAM_DTYPES
from distft.checkpoint.formats.target_state import DEEPSPEED_VERSION, TargetState
from distft.checkpoint.formats.torch_file import ForeignObject, write_torch_file
from distft.checkpoint.formats.torch_pickle import is_plain
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.sources import CheckpointSource
from distft.errors import CheckpointError, ConfigError, Mistakes


def write_deepspeed(
    source: CheckpointSource,
    target: str,
    *,
    zero_stage: int,
    world_size: int,
    param_dtype: str,
    tag: str,
    on_progress: Callable[[int], None] = lambda _num_bytes: None,
    sub_group_numel: int = SUB_GROUP_NUMEL,
) -> None:
    """Write `source` to `target`/`tag` for a script with its parameter groups, and `latest` at the end.

    `param_dtype` is what the script computes in (fp32, bf16 or fp16), `sub_group_numel` its
    zero_optimization.sub_group_size at stage 3. Without groups in the manifest, the script has one of all
    trainable parameters in the manifest's order. `on_progress` is told the bytes of each piece written.
    The script's optimizer is one of torch's, or DeepSpeed's Adam as the source tells. Raises `ConfigError`
    for settings that cannot be, `CheckpointError` for a source that does not fit them.
    """
    directory = storage.join(target, tag)
    _check(zero_stage, world_size, param_dtype, directory)
    files = _Files(TargetState(source), zero_stage, world_size, PARAM_DTYPES[param_dtype], sub_group_numel)
    for name, content in files.all():
        write_torch_file(storage.join(directory, name), content, on_progress=on_progress)
    storage.commit_bytes(storage.join(target, LATEST), tag.encode())


def _check(zero_stage: int, world_size: int, param_dtype: str, directory: str) -> None:
    mistakes = Mistakes()
    with mistakes.gather():
        if zero_stage not in range(4):
            raise ConfigError(f"zero_stage={zero_stage}: ZeRO has the stages 0 to 3.")
    with mistakes.gather():
        if world_size < 1:
            raise ConfigError(f"world_size={world_size}: there must be a rank to write for.")
    with mistakes.gather():
        if param_dtype not in PARAM_DTYPES:
            raise ConfigError(f"param_dtype={param_dtype!r} is none of {', '.join(PARAM_DTYPES)}.")
    with mistakes.gather():
        if storage.list_names(directory):
            raise ConfigError(f"{directory} is not empty: give another tag, or remove what is there.")
    mistakes.raise_if_any()


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of one checkpoint, and what is in them; nothing of it is read before it is written."""

    state: TargetState
    zero_stage: int
    world_size: int
    param_dtype: torch.dtype
    sub_group_numel: int

    def all(self) -> Iterator[tuple[str, Any]]:
        """Names and contents. All that can be wrong with the source shows before the first is written."""
        contents: list[tuple[str, Any]] = []
        is_bf16 = self.param_dtype == torch.bfloat16
        for rank in range(self.world_size if self.zero_stage else 0):
            optimizer = self._sliced(rank) if self.zero_stage == 3 else self._flat(rank)
            content = {"optimizer_state_dict": optimizer, "ds_config": {}, "ds_version": DEEPSPEED_VERSION}
            contents.append((optimizer_file(rank, is_bf16=is_bf16), content))
        if self.zero_stage == 3:
            contents += [(sliced_model_file(rank), self._model(rank)) for rank in range(self.world_size)]
        else:
            contents.append((MODEL_FILE, self._model(0)))
        yield from contents

    def _model(self, rank: int) -> dict[str, Any]:
        """The file of the module's state, by which each rank knows where the run stands."""
        progress, is_zero = self.state.manifest.progress, self.zero_stage > 0
        frozen = self._frozen()
        module = self._module(frozen)
        own = {
            "module": module,
            "buffer_names": [name for name in module if self._is_buffer(name)],
            "optimizer": None if is_zero else self._whole(),
            "param_shapes": self._param_shapes(),  # DeepSpeed has none at stage 0, nor would it look
            "frozen_param_shapes": self._shapes(frozen) if self.zero_stage >= 2 else None,
            "shared_params": dict(self.state.manifest.tied) if is_zero else None,
            "frozen_param_fragments": self._fragments(frozen, module, rank) if self.zero_stage >= 2 else None,
            "lr_scheduler": self.state.lr_scheduler(),
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": progress.skipped_steps,
            "global_steps": progress.step,
            "global_samples": progress.sequences_seen,
            "dp_world_size": self.world_size,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "ds_config": {},
            "ds_version": DEEPSPEED_VERSION,
        }
        client = self.state.script.client_state or {}
        return {**{key: value for key, value in client.items() if is_plain(value)}, **own}

    def _is_buffer(self, name: str) -> bool:
        manifest = self.state.manifest
        return manifest.parameters[manifest.tied.get(name, name)].is_buffer

    def _frozen(self) -> list[str]:
        records = self.state.manifest.parameters.items()
        return [name for name, record in records if not record.trainable and not record.is_buffer]

    def _shapes(self, names: Sequence[str]) -> "OrderedDict[str, torch.Size]":
        parameters = self.state.manifest.parameters
        return OrderedDict((name, torch.Size(parameters[name].shape)) for name in names)

    def _param_shapes(self) -> list[Any]:
        flats = self._sub_groups() if self.zero_stage == 3 else self._groups()
        return [self._shapes(list(numels)) for _, numels in flats]

    def _module(self, frozen: Sequence[str]) -> "OrderedDict[str, Any]":
        """The module's state dict; at stage 3 parameters are empty in it, for each rank has its slices."""
        module: OrderedDict[str, Any] = OrderedDict()
        for name, record in self.state.manifest.parameters.items():
            dtype = self.state.in_module(name, self.param_dtype)
            is_sliced = self.zero_stage == 3 and (record.trainable or name in frozen)
            module[name] = torch.empty(0, dtype=dtype) if is_sliced else self.state.whole(name, WEIGHT, dtype)
        for name, kept in self.state.manifest.tied.items():
            module[name] = module[kept]
        return module

    def _fragments(
        self, frozen: Sequence[str], module: Mapping[str, Any], rank: int
    ) -> "OrderedDict[str, Any]":
        """Frozen parameters: whole at stage 2, a rank's padded slice of each at stage 3."""
        if self.zero_stage == 2:
            return OrderedDict((name, module[name]) for name in frozen)
        fragments: OrderedDict[str, Any] = OrderedDict()
        for name, numel in self.state.numels(frozen).items():
            runs = list(sliced_runs({name: numel}, rank, self.world_size))
            fragments[name] = self.state.flat(runs, WEIGHT, self.state.in_module(name, self.param_dtype))
        return fragments

    def _groups(self) -> list[tuple[int, dict[str, int]]]:
        """Number of the group, and numbers of elements of its parameters."""
        return [(i, self.state.numels(group.parameters)) for i, group in enumerate(self.state.groups)]

    def _sub_groups(self) -> list[tuple[int, dict[str, int]]]:
        return [
            (number, members)
            for number, numels in self._groups()
            for members in sub_groups(numels, self.world_size, self.sub_group_numel)
        ]

    def _moments(self, number: int, numels: Mapping[str, int], runs: Sequence[Run]) -> dict[str, Any]:
        updates, moments = self.state.updates(list(numels)), self.state.moments(numels)
        if not moments:
            return {}
        flat = {moment: self.state.flat(runs, moment) for moment in moments}
        return {"step": self.state.step(number, updates), **flat}

    def _flat(self, rank: int) -> dict[str, Any]:
        """Stages 1 and 2: a rank's part of each group's flat buffer."""
        masters, paddings, slices, moments = [], [], [], {}
        for number, numels in self._groups():
            size = flat_partition_numel(numels, self.world_size)
            start, total = rank * size, sum(numels.values())
            end = max(min(start + size, total), start)
            runs = list(flat_runs(numels, start, end))
            masters.append(self.state.flat(runs, WEIGHT))
            slices.append(_addresses(runs))
            paddings.append(start + size - end)
            padded = list(flat_runs(numels, start, start + size))
            if found := self._moments(number, numels, padded):
                moments[number] = found
        count = len(masters)
        scaler = (
            {"loss_scaler": self.state.loss_scaler(self.param_dtype), "dynamic_loss_scale": True}
            if self.param_dtype == torch.float16
            else {}  # as the script is configured
        )
        return {
            **scaler,
            "overflow": False,
            "base_optimizer_state": {
                "state": moments,
                "param_groups": [self.state.settings(number, [number]) for number in range(count)],
            },
            "single_partition_of_fp32_groups": masters,
            "zero_stage": self.zero_stage,
            "group_paddings": paddings,
            "partition_count": [self.world_size] * count,
            "param_slice_mappings": slices,
            "ds_version": DEEPSPEED_VERSION,
        }

    def _sliced(self, rank: int) -> dict[str, Any]:
        """Stage 3: a rank's slices of all parameters."""
        masters, moments = [], {}
        indices: list[list[int]] = [[] for _ in self.state.groups]
        for index, (number, numels) in enumerate(self._sub_groups()):
            runs = list(sliced_runs(numels, rank, self.world_size))
            masters.append(self.state.flat(runs, WEIGHT))
            indices[number].append(index)
            if found := self._moments(number, numels, runs):
                moments[index] = found
        return {
            "zero_stage": self.zero_stage,
            "loss_scaler": self.state.loss_scaler(self.param_dtype),
            "dynamic_loss_scale": self.param_dtype == torch.float16,
            "overflow": False,
            "partition_count": self.world_size,
            "optimizer_state_dict": {
                "state": moments,
                "param_groups": [self.state.settings(i, members) for i, members in enumerate(indices)],
            },
            "fp32_flat_groups": masters,
        }

    def _whole(self) -> dict[str, Any]:
        """Stage 0: the optimizer's own state dict, under the wrapper of 16-bit training."""
        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        index = 0
        for number, group in enumerate(self.state.groups):
            first = index
            for name in group.parameters:
                updates = self.state.manifest.parameters[name].updates
                moments = self.state.moments([name])
                if moments:
                    tensors = {moment: self.state.whole(name, moment, torch.float32) for moment in moments}
                    states[index] = {"step": self.state.step(number, updates), **tensors}
                index += 1
            groups.append(self.state.settings(number, range(first, index)))
        inner = {"state": states, "param_groups": groups}
        if self.param_dtype == torch.float32:
            return inner
        if any("bias_correction" in group for group in groups):
            raise CheckpointError(
                f"{self.state.source.path} was trained with DeepSpeed's own Adam, which at stage 0 in 16 "
                "bits keeps its state in a layout that is not written here: write stage 1, or fp32."
            )
        is_dynamic = self.param_dtype == torch.float16
        scale = self.state.loss_scale_numbers()
        static = {"cur_scale": 1.0, "cur_iter": scale["cur_iter"]}
        return {
            "dynamic_loss_scale": is_dynamic,
            **(scale if is_dynamic else static),
            "optimizer_state_dict": inner,
            "fp32_groups": [
                [self.state.whole(name, WEIGHT, torch.float32) for name in group.parameters]
                for group in self.state.groups
            ],
        }


def _addresses(runs: Sequence[Run]) -> "OrderedDict[str, ForeignObject]":
    """Where a rank's part of each parameter lies in its flat partition, as ds_to_universal looks it up."""
    addresses: OrderedDict[str, ForeignObject] = OrderedDict()
    position = 0
    for run in runs:
        if run.parameter is not None:
            fields = {"numel": run.numel, "start": position}
            addresses[run.parameter] = ForeignObject(
                "deepspeed.utils.tensor_fragment", "fragment_address", fields
            )
        position += run.numel
    return addresses
