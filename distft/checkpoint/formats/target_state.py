"""What every DeepSpeed target takes from a source: groups, tensors that are made while they are written."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from distft.checkpoint.formats.deepspeed_layout import Run
from distft.checkpoint.formats.deepspeed_model import ScriptState
from distft.checkpoint.formats.torch_file import CHUNK_NUMEL, ForeignObject, StreamedTensor
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import GroupRecord
from distft.checkpoint.sources import CheckpointSource, read_state
from distft.errors import CheckpointError

DEEPSPEED_VERSION = "0.19.8"  # whose layout is written
# torch.optim.AdamW's own, for checkpoints that tell nothing of an optimizer.
_DEFAULT_SETTINGS = MappingProxyType({"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2})
_SCALERS = "deepspeed.runtime.fp16.loss_scaler"


class TargetState:
    """A source, as the writers of DeepSpeed's formats see it."""

    def __init__(self, source: CheckpointSource) -> None:
        """Raises `CheckpointError` where groups and parameters do not fit each other."""
        self.source = source
        self.manifest = source.manifest
        script = getattr(source, "script", None)  # what only DeepSpeed's own checkpoints keep
        self.script = script if isinstance(script, ScriptState) else ScriptState()
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
                f"{self.source.path}: each trainable parameter must be in one group of the manifest, and "
                f"{', '.join(wrong[:10])} {'are' if len(wrong) > 1 else 'is'} not: the checkpoint is damaged."
            )

    def numels(self, names: Iterable[str]) -> dict[str, int]:
        return {name: prod(self.manifest.parameters[name].shape) for name in names}

    def moments(self, names: Iterable[str]) -> list[str]:
        """The states besides the weight that any of these parameters has."""
        found: dict[str, None] = {}
        for name in names:
            found |= dict.fromkeys(self.manifest.parameters[name].states)
        return [state for state in found if state != WEIGHT]

    def updates(self, names: Sequence[str]) -> int:
        """The update count of parameters that share one. Raises `CheckpointError` where theirs differ."""
        counts: dict[int, list[str]] = {}
        for name in names:
            counts.setdefault(self.manifest.parameters[name].updates, []).append(name)
        if len(counts) > 1:
            told = "; ".join(f"{count} updates: {', '.join(who[:5])}" for count, who in counts.items())
            raise CheckpointError(
                f"{self.source.path}: DeepSpeed's ZeRO counts updates by group, and one group holds {told}. "
                "Write ZeRO stage 0, which counts by parameter, or put them into groups of their own."
            )
        return next(iter(counts), 0)

    def settings(self, number: int, indices: Sequence[int]) -> dict[str, Any]:
        """A group as torch's optimizers save it."""
        settings = self.groups[number].settings
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        return {**plain, "params": list(indices)}

    def step(self, number: int, updates: int) -> Tensor | int:
        """An update count as a group's optimizer keeps it: DeepSpeed's own Adams as a number."""
        is_deepspeeds = "bias_correction" in self.groups[number].settings
        return updates if is_deepspeeds else torch.tensor(float(updates))

    def whole(
        self, name: str, state: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None
    ) -> StreamedTensor:
        """A state of one parameter."""
        shape = self.manifest.parameters[name].shape if shape is None else shape
        return StreamedTensor(dtype, shape, lambda: self._chunks([Run(name, 0, prod(shape))], state, dtype))

    def flat(self, runs: Sequence[Run], state: str, dtype: torch.dtype = torch.float32) -> StreamedTensor:
        """A state of many parameters, end to end."""
        numel = sum(run.numel for run in runs)
        return StreamedTensor(dtype, (numel,), lambda: self._chunks(runs, state, dtype))

    def _chunks(self, runs: Sequence[Run], state: str, dtype: torch.dtype) -> Iterator[Tensor]:
        for run in runs:
            for start in range(run.start, run.stop, CHUNK_NUMEL):
                values = torch.zeros(min(CHUNK_NUMEL, run.stop - start), dtype=dtype)
                if run.parameter is not None:
                    read_state(self.source, run.parameter, state, values, start)
                yield values

    def in_module(self, name: str, param_dtype: torch.dtype) -> torch.dtype:
        """What the module keeps a parameter or a buffer in."""
        record = self.manifest.parameters[name]
        own: torch.dtype = getattr(torch, record.states[WEIGHT].dtype)
        return param_dtype if own.is_floating_point and not record.is_buffer else own

    def loss_scaler(self, param_dtype: torch.dtype) -> ForeignObject:
        """DeepSpeed's loss scaler, by name; what the source had of it, in fp16."""
        if param_dtype != torch.float16:
            return ForeignObject(_SCALERS, "LossScaler", {"cur_scale": 1.0, "dynamic": False})
        if self.script.loss_scaler is not None and self.script.loss_scaler.fields.get("dynamic"):
            return self.script.loss_scaler
        fields = {
            **self.loss_scale_numbers(),
            "min_scale": 1.0,
            "delayed_shift": 2,
            "cur_hysteresis": int((self.manifest.progress.loss_scale or {}).get("tolerance", 2)) or 1,
            "consecutive_hysteresis": False,
            "raise_error_at_min_scale": True,
            "dynamic": True,
            "dtype": torch.float16,
        }
        return ForeignObject(_SCALERS, "DynamicLossScaler", fields)

    def loss_scale_numbers(self) -> dict[str, Any]:
        """How far a dynamic loss scale has come, in DeepSpeed's words and with its defaults."""
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
        """The state of the script's scheduler, or enough for one of DeepSpeed's or torch's to go on from."""
        if self.script.lr_scheduler is not None:
            return self.script.lr_scheduler
        num_steps = self.manifest.progress.step - self.manifest.progress.skipped_steps
        rates = [group.settings.get("lr") for group in self.groups]
        return {
            "last_batch_iteration": num_steps - 1,  # DeepSpeed's
            "last_epoch": num_steps,  # torch's
            "_step_count": num_steps + 1,
            "_last_lr": rates,
            "lr_lambdas": [None] * len(rates),
        }
