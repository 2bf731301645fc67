"""Builds the entries of DeepSpeed's checkpoint files from any checkpoint source; tensors are streamed."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from distft.checkpoint.formats.deepspeed.contents import ExtraState
from distft.checkpoint.formats.deepspeed.layout import Span
from distft.checkpoint.formats.torch_file import CHUNK_NUMEL, can_pickle
from distft.checkpoint.formats.torch_file.values import OpaqueObject, StreamedTensor
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import GroupRecord
from distft.checkpoint.sources import CheckpointSource, read_state
from distft.errors import CheckpointError

DEEPSPEED_VERSION = "0.19.8"  # distft writes the layout of this version
# Defaults of torch.optim.AdamW, for checkpoints without the optimizer's settings.
_DEFAULT_SETTINGS = MappingProxyType({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2})
WRITTEN_BY_DISTFT = "distft"  # key in ds_config, where DeepSpeed's own have the script's configuration
_LOSS_SCALER_MODULE = "deepspeed.runtime.fp16.loss_scaler"


class StateDictBuilder:
    """Parameter groups, optimizer states, loss scaler and scheduler of a source, in DeepSpeed's form."""

    def __init__(self, source: CheckpointSource) -> None:
        """Raises `CheckpointError` unless every trainable parameter is in exactly one group."""
        self.source = source
        self.manifest = source.manifest
        extra_state = getattr(source, "extra_state", None)  # DeepSpeed's own checkpoints have it
        self.extra_state = extra_state if isinstance(extra_state, ExtraState) else ExtraState()
        self.groups = self._groups()
        self._check_groups()

    def _groups(self) -> list[GroupRecord]:
        if self.manifest.groups:
            return self.manifest.groups
        names = [name for name, record in self.manifest.parameters.items() if record.trainable]
        optim = self.manifest.config.get("optim") or {}
        settings = {key: optim.get(key, value) for key, value in _DEFAULT_SETTINGS.items()}
        settings["lr"] = optim.get("peak_lr", settings["lr"])
        return [GroupRecord(parameters=tuple(names), settings=settings)] if names else []

    def _check_groups(self) -> None:
        grouped = [name for group in self.groups for name in group.parameters]
        trainable = {name for name, record in self.manifest.parameters.items() if record.trainable}
        wrong = sorted(set(grouped) ^ trainable) or sorted(n for n in set(grouped) if grouped.count(n) > 1)
        if wrong:
            raise CheckpointError(
                f"{self.source.path} is damaged: each trainable parameter must be in exactly one group of "
                f"the manifest, but {', '.join(wrong[:10])} {'are' if len(wrong) > 1 else 'is'} not. "
                "Use another checkpoint."
            )

    def model_file(
        self, module: Mapping[str, Any], param_shapes: Sequence[Any], *, world_size: int, **entries: Any
    ) -> dict[str, Any]:
        """Content of a model file: the module's state dict, the progress, the script's client_state."""
        progress, client_state = self.manifest.progress, self.extra_state.client_state or {}
        parameters, tied = self.manifest.parameters, self.manifest.tied
        content: dict[str, Any] = {
            "module": module,
            "buffer_names": [name for name in module if parameters[tied.get(name, name)].is_buffer],
            "optimizer": None,
            "param_shapes": param_shapes,
            "frozen_param_shapes": None,
            "shared_params": None,
            "frozen_param_fragments": None,
            "lr_scheduler": self.lr_scheduler(),
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": progress.skipped_steps,
            "global_steps": progress.step,
            "global_samples": progress.sequences_seen,
            "dp_world_size": world_size,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            **self.identity(),
            **entries,
        }
        return {**{key: value for key, value in client_state.items() if can_pickle(value)}, **content}

    def identity(self) -> dict[str, Any]:
        """What all files of one checkpoint have in common, so that mixed ones are found."""
        origin = {"run_id": self.manifest.run_id, "step": self.manifest.progress.step}
        return {"ds_config": {WRITTEN_BY_DISTFT: origin}, "ds_version": DEEPSPEED_VERSION}

    def shapes(self, names: Iterable[str]) -> "OrderedDict[str, torch.Size]":
        return OrderedDict((name, torch.Size(self.manifest.parameters[name].shape)) for name in names)

    def numels(self, names: Iterable[str]) -> dict[str, int]:
        return {name: prod(self.manifest.parameters[name].shape) for name in names}

    def moments(self, names: Iterable[str]) -> list[str]:
        """The states other than the weight that any of these parameters has."""
        states: dict[str, None] = {}
        for name in names:
            states |= dict.fromkeys(self.manifest.parameters[name].states)
        return [state for state in states if state != WEIGHT]

    def updates(self, names: Sequence[str]) -> int:
        """The common update count of these parameters. Raises `CheckpointError` if their counts differ."""
        by_count: dict[int, list[str]] = {}
        for name in names:
            by_count.setdefault(self.manifest.parameters[name].updates, []).append(name)
        if len(by_count) > 1:
            counts = "; ".join(f"{count} updates: {', '.join(some[:5])}" for count, some in by_count.items())
            raise CheckpointError(
                f"{self.source.path}: DeepSpeed's ZeRO keeps one update count per group, but the counts of "
                f"one group differ ({counts}). Write ZeRO stage 0, which counts per parameter, or put these "
                "parameters into separate groups."
            )
        return next(iter(by_count), 0)

    def param_group(self, number: int, indices: Sequence[int]) -> dict[str, Any]:
        """A group as an entry of torch's `param_groups`."""
        settings = self.groups[number].settings
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        return {**plain, "params": list(indices)}

    def step(self, number: int, updates: int) -> Tensor | int:
        """An update count in the type that the group's optimizer keeps: an int for DeepSpeed's own Adam."""
        is_deepspeed_adam = "bias_correction" in self.groups[number].settings
        return updates if is_deepspeed_adam else torch.tensor(float(updates))

    def parameter_state(self, name: str, state: str, dtype: torch.dtype) -> StreamedTensor:
        """A state of one parameter, in the parameter's shape."""
        shape = self.manifest.parameters[name].shape
        return StreamedTensor(dtype, shape, lambda: self._chunks([Span(name, 0, prod(shape))], state, dtype))

    def flat_state(
        self, spans: Sequence[Span], state: str, dtype: torch.dtype = torch.float32
    ) -> StreamedTensor:
        """A state of `spans` end to end, as a 1-D tensor."""
        numel = sum(span.numel for span in spans)
        return StreamedTensor(dtype, (numel,), lambda: self._chunks(spans, state, dtype))

    def _chunks(self, spans: Sequence[Span], state: str, dtype: torch.dtype) -> Iterator[Tensor]:
        for span in spans:
            for start in range(span.start, span.stop, CHUNK_NUMEL):
                values = torch.zeros(min(CHUNK_NUMEL, span.stop - start), dtype=dtype)
                if span.parameter is not None:
                    read_state(self.source, span.parameter, state, values, start)
                yield values

    def module_dtype(self, name: str, param_dtype: torch.dtype) -> torch.dtype:
        """The dtype of a parameter or buffer in the module's state dict."""
        record = self.manifest.parameters[name]
        stored: torch.dtype = getattr(torch, record.states[WEIGHT].dtype)
        return param_dtype if stored.is_floating_point and not record.is_buffer else stored

    def loss_scaler(self, param_dtype: torch.dtype) -> OpaqueObject:
        """DeepSpeed's loss scaler object; in fp16 the source's own, if it has one."""
        if param_dtype != torch.float16:
            return OpaqueObject(_LOSS_SCALER_MODULE, "LossScaler", {"cur_scale": 1.0, "dynamic": False})
        scaler = self.extra_state.loss_scaler
        if scaler is not None and scaler.fields.get("dynamic"):
            return scaler
        fields = {
            **self.loss_scale_fields(),
            "min_scale": 1.0,
            "delayed_shift": 2,
            "cur_hysteresis": int((self.manifest.progress.loss_scale or {}).get("tolerance", 2)) or 1,
            "consecutive_hysteresis": False,
            "raise_error_at_min_scale": True,
            "dynamic": True,
            "dtype": torch.float16,
        }
        return OpaqueObject(_LOSS_SCALER_MODULE, "DynamicLossScaler", fields)

    def loss_scale_fields(self) -> dict[str, Any]:
        """The dynamic loss scale in DeepSpeed's fields, with DeepSpeed's defaults."""
        scale = self.manifest.progress.loss_scale or {}
        step = self.manifest.progress.step
        return {
            "cur_scale": scale.get("scale", 2.0**16),
            "cur_iter": step,
            "last_overflow_iter": step - int(scale.get("good_steps", step)) - 1,
            "scale_factor": 2.0,
            "scale_window": 1000,
        }

    def lr_scheduler(self) -> Any:
        """The source's scheduler state, or the fields that DeepSpeed's and torch's schedulers resume from."""
        if self.extra_state.lr_scheduler is not None:
            return self.extra_state.lr_scheduler
        num_steps = self.manifest.progress.step - self.manifest.progress.skipped_steps
        rates = [group.settings.get("lr") for group in self.groups]
        return {
            "last_batch_iteration": num_steps - 1,  # DeepSpeed's
            "last_epoch": num_steps,  # torch's
            "_step_count": num_steps + 1,
            "_last_lr": rates,
            "lr_lambdas": [None] * len(rates),
        }
