"""The weighted mean of several checkpoints' weights, as one more source."""

from collections.abc import Sequence

import torch
from torch import Tensor

from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import Manifest, ParameterRecord, Progress, StateRecord
from distft.checkpoint.sources import CheckpointSource
from distft.errors import ConfigError


class AveragedCheckpoint:
    """Weights alone, in fp32: the moments of one optimizer say nothing of a mean.

    Everything else is that of the last source which has its run's configuration; of the last one where none
    has. Buffers come from there as they are.
    """

    format = "average"

    def __init__(self, sources: Sequence[CheckpointSource], weights: Sequence[float] | None = None) -> None:
        """`weights` count relative to each other; None: all alike.

        Raises `ConfigError` where the checkpoints are not of one model, or weights do not fit them.
        """
        shares = [1.0] * len(sources) if weights is None else list(weights)
        faults = _faults(sources, shares)
        if faults:
            raise ConfigError("\n".join(faults))
        self._sources = tuple(sources)
        self._shares = [share / sum(shares) for share in shares]
        self._base = _described(sources)
        self.path = self._base.path
        last = self._base.manifest
        self.manifest: Manifest = last.model_copy(
            update={
                "progress": Progress(step=last.progress.step, tokens_seen=last.progress.tokens_seen),
                "parameters": {name: self._record(record) for name, record in last.parameters.items()},
                "groups": [],
                "probe": None,
                "written_by": {
                    **last.written_by,
                    "average_of": {s.path: share for s, share in zip(sources, self._shares, strict=True)},
                },
            }
        )

    @property
    def summary(self) -> str:
        """What it is made of, in a line."""
        names = ", ".join(source.path for source in self._sources)
        shares = ", ".join(f"{share:.4g}" for share in self._shares)
        return f"average of {names} (weights {shares}); step and configuration of {self.path}"

    def _record(self, record: ParameterRecord) -> ParameterRecord:
        dtype = record.states[WEIGHT].dtype if record.is_buffer else "float32"
        return record.model_copy(update={"updates": 0, "states": {WEIGHT: StateRecord(dtype=dtype)}})

    def has(self, parameter: str, state: str) -> bool:
        return state == WEIGHT and parameter in self.manifest.parameters

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return self._base.shape(parameter)

    def updates(self, parameter: str) -> int:  # noqa: ARG002
        return 0

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        if self.manifest.parameters[parameter].is_buffer:
            return self._base.read(parameter, state, start, stop)
        total = torch.zeros(stop - start, dtype=torch.float64)
        for source, share in zip(self._sources, self._shares, strict=True):
            total.add_(source.read(parameter, state, start, stop).double(), alpha=share)
        return total.float()

    def faults(self) -> list[str]:
        return [fault for source in self._sources for fault in source.faults()]


def _described(sources: Sequence[CheckpointSource]) -> CheckpointSource:
    """The last source with a run's configuration; without one the last that tells its model, or any."""
    for key in ("run_dir", "model"):
        for source in reversed(sources):
            if key in source.manifest.config:
                return source
    return sources[-1]


def _faults(sources: Sequence[CheckpointSource], shares: Sequence[float]) -> list[str]:
    faults = []
    if len(sources) < 2:
        faults.append("An average is of two checkpoints or more.")
    if len(shares) != len(sources):
        faults.append(f"{len(shares)} weights were given for {len(sources)} checkpoints: give one for each.")
    elif not sum(shares) > 0:
        faults.append(f"The weights {list(shares)} add up to {sum(shares)}, and must add up to more than 0.")
    if not sources:
        return faults
    shapes = {name: record.shape for name, record in sources[-1].manifest.parameters.items()}
    for source in sources[:-1]:
        theirs = {name: record.shape for name, record in source.manifest.parameters.items()}
        odd = sorted(n for n in {*shapes, *theirs} if shapes.get(n) != theirs.get(n))
        if odd:
            shown = ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
            faults.append(f"{source.path} is of another model than {sources[-1].path}: {shown} differ.")
    return faults
