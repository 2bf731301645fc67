"""The last file of a checkpoint, and the only one that makes it count."""

import json
from typing import Any, Literal

from pydantic import Field, ValidationError

from distft.checkpoint.unread import UnreadError
from distft.config import Settings
from distft.errors import CheckpointError
from distft.storage import checksum_of_bytes

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


class StateRecord(Settings):
    """One state of one parameter, over all files."""

    dtype: str  # torch's name without the prefix: float32, bfloat16
    fingerprint: str | None = None  # 16 hexadecimal digits, see `fragments`; None: a foreign format has none


class ParameterRecord(Settings):
    """One parameter, whole."""

    shape: tuple[int, ...]
    trainable: bool
    updates: int = Field(ge=0)  # optimizer updates that it has had; AdamW's bias correction counts them
    states: dict[str, StateRecord]
    is_buffer: bool = False  # of the module's state, but nothing that an optimizer could train


class GroupRecord(Settings):
    """Parameters that one optimizer treats alike, and how: a DeepSpeed or torch parameter group."""

    parameters: tuple[str, ...]  # in the group's order
    settings: dict[str, Any]  # lr, betas, eps, weight_decay ...: plain numbers


class FileRecord(Settings):
    """One rank's file: what it holds, and how to know that it is whole."""

    # In the checkpoint's directory; behind ../ in another of the same store: frozen weights are written once.
    name: str = Field(pattern=r"^(\.\./\w+/)?\w+\.safetensors$")
    num_bytes: int
    checksum: str
    intervals: dict[str, tuple[int, int]]  # parameter -> elements [start, stop), of each of its states


class ProbeRecord(Settings):
    """The loss on a few fixed sequences, which whoever loads the checkpoint must find again."""

    loss: float
    num_sequences: int  # the first ones of the training data
    param_dtype: str


class TokenizerRecord(Settings):
    """The tokenizer that the run's token ids come from."""

    fingerprint: str
    file: str | None = None  # beside the manifest; absent where the run had token shards only


class Progress(Settings):
    """How far a run has come: all that a resume needs besides parameters; order and rates are functions."""

    step: int = 0  # optimizer steps done, skipped ones included
    sequences_seen: int = 0
    used: tuple[tuple[int, int], ...] = ()  # sequences of the run's order that ranks really used
    used_again: tuple[tuple[int, int], ...] = ()  # those of them that were used twice: never any
    tokens_seen: int = 0  # targets: tokens, or the rows of a classification
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    loss_scale: dict[str, float] | None = None  # fp16 only


class Manifest(Settings):
    """Everything about a checkpoint but its numbers."""

    format: Literal["distft-checkpoint"] = "distft-checkpoint"
    format_version: int = FORMAT_VERSION
    run_id: str
    progress: Progress
    config: dict[str, Any]  # resolved
    label_names: list[str] | None = None
    tokenizer: TokenizerRecord | None = None
    written_by: dict[str, Any]  # engine, world size, versions
    parameters: dict[str, ParameterRecord]
    tied: dict[str, str] = Field({})  # further names of parameters: name -> the name that they are kept under
    groups: list[GroupRecord] = Field([])  # of trainable parameters; empty: as config's optim sorts them
    probe: ProbeRecord | None = None
    files: list[FileRecord]

    def to_bytes(self) -> bytes:
        """JSON that ends in a checksum of the rest."""
        raw = self.model_dump(mode="json")
        return _json({**raw, "checksum": checksum_of_bytes(_json(raw))})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Raises `CheckpointError` for what is not a manifest, or one of a newer format."""
        try:
            raw = json.loads(data)
        except ValueError as error:
            raise CheckpointError(
                f"{where} is not JSON ({error}): the checkpoint is damaged; use another."
            ) from None
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise (UnreadError if isinstance(version, int) else CheckpointError)(
                f"{where} has format_version={version!r}; this distft reads up to {FORMAT_VERSION}: "
                "upgrade distft, or choose another checkpoint."
            )
        checksum = raw.pop("checksum", None)
        if checksum != checksum_of_bytes(_json(raw)):
            raise CheckpointError(
                f"{where} is damaged: it does not have the checksum {checksum} that it was written with; "
                "use another checkpoint."
            )
        try:
            return cls.model_validate_json(_json(raw))
        except ValidationError as error:
            faults = "\n".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise CheckpointError(f"{where} is not a distft checkpoint's manifest:\n{faults}") from None


def _json(raw: dict[str, Any]) -> bytes:
    return json.dumps(raw, indent=1).encode()
