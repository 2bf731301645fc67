"""The weighted mean of several checkpoints' weights, as a checkpoint source."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import ParameterRecord, Progress, StateRecord
from distft.checkpoint.sources import CheckpointSource, ManifestSource
from distft.checkpoint.steps import absolute
from distft.config import redact
from distft.errors import ConfigError


class AveragedCheckpoint(ManifestSource):
    """Mean of the weights in fp32, without moments: those of the sources do not fit the mean.

    Everything else, buffers included, comes from the last source that has a run's configuration, or from the
    last source if none has.
    """

    format = "average"

    def __init__(self, sources: Sequence[CheckpointSource], weights: Sequence[float] | None = None) -> None:
        """`weights` are relative to each other; None: all equal.

        Raises `ConfigError` if the checkpoints are not of the same model, or the weights do not match them.
        """
        factors = [1.0] * len(sources) if weights is None else list(weights)
        problems = _problems(sources, factors)
        if problems:
            raise ConfigError("\n".join(problems))
        self._sources = tuple(sources)
        self._factors = [factor / sum(factors) for factor in factors]
        self._base = _last_with_config(sources)
        base = self._base.manifest
        manifest = base.model_copy(
            update={
                "progress": Progress(step=base.progress.step, tokens_seen=base.progress.tokens_seen),
                "parameters": {name: self._record(record) for name, record in base.parameters.items()},
                "groups": [],
                "probe": None,
                "base": None,
                "written_by": {
                    **base.written_by,
                    "average_of": redact(
                        {s.path: factor for s, factor in zip(sources, self._factors, strict=True)}
                    ),
                },
            }
        )
        super().__init__(self._base.path, manifest)

    @property
    def summary(self) -> str:
        """The sources and their weights, in one line."""
        names = ", ".join(redact(source.path) for source in self._sources)
        factors = ", ".join(f"{factor:.4g}" for factor in self._factors)
        return f"average of {names} (weights {factors}); step and configuration of {redact(self.path)}"

    def _record(self, record: ParameterRecord) -> ParameterRecord:
        dtype = record.states[WEIGHT].dtype if record.is_buffer else "float32"
        return record.model_copy(update={"updates": 0, "states": {WEIGHT: StateRecord(dtype=dtype)}})

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        if self.manifest.parameters[parameter].is_buffer:
            return self._base.read(parameter, state, start, stop)
        total = torch.zeros(stop - start, dtype=torch.float64)
        for source, factor in zip(self._sources, self._factors, strict=True):
            total.add_(source.read(parameter, state, start, stop).double(), alpha=factor)
        return total.float()

    def find_damage(self) -> list[str]:
        return [damage for source in self._sources for damage in source.find_damage()]


def _last_with_config(sources: Sequence[CheckpointSource]) -> CheckpointSource:
    """The last source with a run's configuration; else the last with a model's, else the last."""
    for key in ("run_dir", "model"):
        for source in reversed(sources):
            if key in source.manifest.config:
                return source
    return sources[-1]


def _problems(sources: Sequence[CheckpointSource], weights: Sequence[float]) -> list[str]:
    problems = []
    if len(sources) < 2:
        problems.append("An average needs two checkpoints or more.")
    if len(weights) != len(sources):
        problems.append(
            f"{len(weights)} weights were given for {len(sources)} checkpoints: give one for each."
        )
    elif not 0 < sum(weights) < math.inf:
        problems.append(
            f"The weights {list(weights)} add up to {sum(weights)}, and must add up to a number above 0."
        )
    if not sources:
        return problems
    paths = [absolute(source.path) for source in sources]
    problems += [
        f"{redact(path)} is named {paths.count(path)} times: name it once, and weigh it by --weight."
        for path in dict.fromkeys(paths)
        if paths.count(path) > 1
    ]
    last = {name: record.shape for name, record in sources[-1].manifest.parameters.items()}
    for source in sources[:-1]:
        shapes = {name: record.shape for name, record in source.manifest.parameters.items()}
        differing = sorted(name for name in {*last, *shapes} if last.get(name) != shapes.get(name))
        if differing:
            shown = ", ".join(differing[:5])
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            problems.append(
                f"{source.path} and {sources[-1].path} are not of the same model: {shown}{more} differ."
            )
    return problems
