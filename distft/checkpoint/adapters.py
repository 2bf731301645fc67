"""Adapters in a checkpoint: the same model without them, their product added to the weights beside them.

Shape letters: I inputs, O outputs, N of the rows of a slice.
"""

import torch
from torch import Tensor

from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import ParameterRecord, StateRecord
from distft.checkpoint.sources import CheckpointSource, ManifestSource, StateSource
from distft.config import parse
from distft.errors import CheckpointError
from distft.model.lora_config import MAGNITUDE, A, B, LoraConfig, is_adapter


def adapters_of(source: CheckpointSource) -> LoraConfig | None:
    """The settings of a checkpoint's adapters; None: it has none."""
    raw = source.manifest.config.get("lora")
    if raw is None:
        return None
    config: LoraConfig = parse(LoraConfig, raw, where=f"{source.path}: lora")
    return config


def merged(source: CheckpointSource) -> CheckpointSource:
    """`source`, or if it has adapters the same model without them, of equal outputs."""
    config = adapters_of(source)
    return source if config is None else MergedCheckpoint(source, config)


class MergedCheckpoint(ManifestSource):
    """Weights W + scale * B A, with DoRA each row with its magnitude, computed in fp32 as they are read.

    It has no other states: moments of A and B say nothing of the product's.
    """

    def __init__(self, source: CheckpointSource, config: LoraConfig) -> None:
        records = source.manifest.parameters
        self.format = source.format
        self._source, self._config = source, config
        self._adapted = {name for name in records if f"{_layer(name)}.{A}" in records and _is_weight(name)}
        manifest = source.manifest.model_copy(
            update={
                "config": {**source.manifest.config, "lora": None},
                "parameters": {n: self._record(n, r) for n, r in records.items() if not is_adapter(n)},
                "groups": [],
                "probe": None,
                "base": None,
            }
        )
        super().__init__(source.path, manifest)
        self._last: tuple[str, Tensor] | None = None  # A of the layer that was read last

    def _record(self, name: str, record: ParameterRecord) -> ParameterRecord:
        dtype = "float32" if name in self._adapted else record.states[WEIGHT].dtype
        return record.model_copy(update={"updates": 0, "states": {WEIGHT: StateRecord(dtype=dtype)}})

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        values = self._source.read
        if parameter not in self._adapted or start == stop:
            return values(parameter, state, start, stop)
        layer, num_inputs = _layer(parameter), self._shape(parameter)[1]
        first, last = start // num_inputs, -(-stop // num_inputs)
        weight_NI = values(parameter, WEIGHT, first * num_inputs, last * num_inputs).float()
        rank = self._config.rank
        b_NR = values(f"{layer}.{B}", WEIGHT, first * rank, last * rank).float().view(-1, rank)
        merged_NI = weight_NI.view(-1, num_inputs) + self._config.scale * (b_NR @ self._a(layer))
        if self._config.dora:
            magnitudes_N = values(f"{layer}.{MAGNITUDE}", WEIGHT, first, last).float()
            norms_N = torch.linalg.vector_norm(merged_NI, dim=1).clamp_min(torch.finfo(torch.float32).tiny)
            merged_NI = merged_NI * (magnitudes_N / norms_N)[:, None]
        return merged_NI.view(-1)[start - first * num_inputs : stop - first * num_inputs]

    def _a(self, layer: str) -> Tensor:
        if self._last is None or self._last[0] != layer:
            name = f"{layer}.{A}"
            shape = self._shape_of_source(name)
            self._last = layer, self._source.read(name, WEIGHT, 0, shape[0] * shape[1]).float().view(shape)
        return self._last[1]

    def _shape_of_source(self, name: str) -> tuple[int, ...]:
        shape = self._source.shape(name)
        assert shape is not None
        return shape

    def _shape(self, parameter: str) -> tuple[int, ...]:
        return self.manifest.parameters[parameter].shape

    def find_damage(self) -> list[str]:
        return self._source.find_damage()


class InitialMagnitudes:
    """DoRA's magnitudes before training: the length of each row of the weights of `base`."""

    def __init__(self, base: StateSource) -> None:
        self._base = base

    def has(self, parameter: str, state: str) -> bool:
        is_magnitude = state == WEIGHT and parameter.endswith(f".{MAGNITUDE}")
        return is_magnitude and self._base.has(_weight(parameter), WEIGHT)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        weight = self._base.shape(_weight(parameter))
        return None if weight is None else weight[:1]

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        shape = self._base.shape(_weight(parameter))
        if shape is None:
            raise CheckpointError(f"No source has the weight of {_weight(parameter)!r}.")
        num_inputs = shape[1]
        rows = self._base.read(_weight(parameter), state, start * num_inputs, stop * num_inputs)
        norms: Tensor = torch.linalg.vector_norm(rows.float().view(-1, num_inputs), dim=1)
        return norms

    def dtype(self, parameter: str, state: str) -> torch.dtype:  # noqa: ARG002
        return torch.float32

    def updates(self, parameter: str) -> int:  # noqa: ARG002
        return 0


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _weight(parameter: str) -> str:
    """The weight beside an adapter's parameter."""
    return f"{_layer(parameter)}.weight"


def _is_weight(parameter: str) -> bool:
    return parameter.endswith(".weight")
