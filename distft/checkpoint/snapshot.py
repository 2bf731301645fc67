"""Everything that one commit stores: progress, fragments, and a description of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distft.checkpoint.fragments import WEIGHT, Fragment
from distft.checkpoint.manifest import (
    BaseRecord,
    FileRecord,
    GroupRecord,
    Manifest,
    ParameterRecord,
    ProbeRecord,
    Progress,
    StateRecord,
    TokenizerRecord,
)


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """One parameter of the model that is being saved."""

    shape: tuple[int, ...]
    trainable: bool
    updates: int  # optimizer updates so far
    is_buffer: bool = False  # it changes, but by no optimizer

    @property
    def is_constant(self) -> bool:
        """Whether a run does not change it."""
        return not self.trainable and not self.is_buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class RunMetadata:
    """Fields of the manifest that describe the run, not its state."""

    run_id: str
    config: dict[str, Any]
    written_by: dict[str, Any]
    label_names: list[str] | dict[str, list[str]] | None = None
    tokenizer: TokenizerRecord | None = None
    groups: list[GroupRecord] = field(default_factory=list)
    tied: dict[str, str] = field(default_factory=dict)
    probe: ProbeRecord | None = None
    data_fingerprint: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSnapshot:
    """Content of one commit; `fragments` are this rank's, the rest is the same on all ranks."""

    progress: Progress
    fragments: Sequence[Fragment]
    parameters: Mapping[str, ParameterInfo]
    metadata: RunMetadata
    attachments: Mapping[str, bytes]  # further files, by name

    def manifest(
        self,
        files: Sequence[FileRecord],
        records: Mapping[str, Mapping[str, StateRecord]],
        base: BaseRecord | None = None,
    ) -> Manifest:
        """The manifest of a commit with these files and states (parameter -> state -> record)."""
        run = self.metadata
        return Manifest(
            run_id=run.run_id,
            progress=self.progress,
            config=run.config,
            label_names=run.label_names,
            tokenizer=run.tokenizer,
            written_by=run.written_by,
            groups=run.groups,
            tied=run.tied,
            probe=run.probe,
            data_fingerprint=run.data_fingerprint,
            base=base,
            parameters={
                name: ParameterRecord(
                    shape=info.shape,
                    trainable=info.trainable,
                    is_buffer=info.is_buffer,
                    updates=info.updates,
                    states=dict(sorted(records[name].items(), key=lambda item: item[0] != WEIGHT)),
                )
                for name, info in self.parameters.items()
            },
            files=list(files),
        )
