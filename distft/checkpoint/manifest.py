"""The manifest, a checkpoint's last file: a checkpoint without one is uncommitted."""

import json
from typing import Any, Literal

from pydantic import Field, ValidationError

from distft.config import Settings
from distft.errors import CheckpointError, UnsupportedFormatError
from distft.storage import checksum_of_bytes

MANIFEST = "manifest.json"
FORMAT_VERSION = 2


class StateRecord(Settings):
    """One state of one parameter, over all files."""

    dtype: str  # torch's name without the prefix: float32, bfloat16
    fingerprint: str | None = None  # 16 hexadecimal digits; None: the (foreign) format has none


class ParameterRecord(Settings):
    """One parameter of the model, over all files."""

    shape: tuple[int, ...]
    trainable: bool
    updates: int = Field(ge=0)  # optimizer updates so far; AdamW's bias correction needs the number
    states: dict[str, StateRecord]
    is_buffer: bool = False  # in the module's state, but not trainable by an optimizer


class GroupRecord(Settings):
    """A DeepSpeed or torch parameter group: parameters and the settings that they share."""

    parameters: tuple[str, ...]  # in the group's order
    settings: dict[str, Any]  # lr, betas, eps, weight_decay ...: plain numbers


class FileRecord(Settings):
    """One rank's file: its content, and how to verify it."""

    # In the checkpoint's directory, or in ../, another of the same store: frozen weights are written once.
    name: str = Field(pattern=r"^(\.\./\w+/)?\w+\.safetensors$")
    num_bytes: int
    checksum: str
    intervals: dict[str, tuple[int, int]]  # parameter -> elements [start, stop), of each of its states


class ProbeRecord(Settings):
    """The loss on a few fixed sequences, which a loaded checkpoint must reproduce."""

    loss: float
    num_sequences: int  # the first ones of the training data
    param_dtype: str


class TokenizerRecord(Settings):
    """The tokenizer that made the run's token ids."""

    fingerprint: str
    file: str | None = None  # beside the manifest; None: the run had token shards only


class Progress(Settings):
    """How far a run has trained.

    A resume needs this and the parameters only: data order and learning rates are functions of it.
    """

    step: int = 0  # optimizer steps done, skipped ones included
    sequences_seen: int = 0
    used: tuple[tuple[int, int], ...] = ()  # [start, stop) of the run's data order that ranks have used
    used_again: tuple[tuple[int, int], ...] = ()  # those that were used twice; empty unless there is a bug
    tokens_seen: int = 0  # targets: tokens, or the rows of a classification
    skipped_steps: int = 0  # gradients were not finite
    skipped_in_a_row: int = 0
    steps_without_targets: int = 0  # steps whose whole batch had no target, so they updated nothing
    loss_scale: dict[str, float] | None = None  # fp16 only


class Manifest(Settings):
    """Everything about a checkpoint except its tensors."""

    format: Literal["distft-checkpoint"] = "distft-checkpoint"
    format_version: int = FORMAT_VERSION
    run_id: str
    progress: Progress
    config: dict[str, Any]  # resolved
    label_names: list[str] | None = None
    tokenizer: TokenizerRecord | None = None
    written_by: dict[str, Any]  # engine, world size, versions
    parameters: dict[str, ParameterRecord]
    tied: dict[str, str] = Field({})  # further name of a parameter -> the name it is saved under
    groups: list[GroupRecord] = Field([])  # of trainable parameters; empty: grouped by config's optim
    probe: ProbeRecord | None = None
    data_fingerprint: str | None = None  # of the training data's content; None: unknown
    files: list[FileRecord]

    def to_bytes(self) -> bytes:
        """JSON whose last key is a checksum of the rest."""
        raw = self.model_dump(mode="json")
        return _json({**raw, "checksum": checksum_of_bytes(_json(raw))})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Parse the content of the file `where`.

        Raises `CheckpointError` if it is damaged or not a manifest, `UnsupportedFormatError` for a newer one.
        """
        try:
            raw = json.loads(data)
        except ValueError as error:
            raise CheckpointError(
                f"{where} is not JSON ({error}): the checkpoint is damaged; use another."
            ) from None
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise (UnsupportedFormatError if isinstance(version, int) else CheckpointError)(
                f"{where} has format_version={version!r}; this distft reads up to {FORMAT_VERSION}: "
                "upgrade distft, or choose another checkpoint."
            )
        checksum = raw.pop("checksum", None)
        if checksum != checksum_of_bytes(_json(raw)):
            raise CheckpointError(
                f"{where} is damaged: its content does not match its checksum {checksum}; "
                "use another checkpoint."
            )
        try:
            return cls.model_validate_json(_json(raw))
        except ValidationError as error:
            problems = "\n".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise CheckpointError(f"{where} is not a distft checkpoint's manifest:\n{problems}") from None


def _json(raw: dict[str, Any]) -> bytes:
    return json.dumps(raw, indent=1).encode()
