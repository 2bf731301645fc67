"""The manifest, a checkpoint's last file: a checkpoint without one is uncommitted."""

import json
import re
from math import prod
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator
from pydantic_core import to_json

from distft.config import Settings
from distft.errors import CheckpointError, UnsupportedFormatError
from distft.storage import checksum_of_bytes

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
_END = b"\n}"
_CHECKSUM_KEY = ',\n "checksum": '
_HEAD = re.compile(rb'\{\n "format": "distft-checkpoint",\n "format_version": (?P<version>\d{1,9}),\n')
_MOST_PROBLEMS = 20  # in a message
_MOST_ELEMENTS = 1 << 60  # of a parameter; more bytes than fit into a signed 64-bit number

# Every format makes files and directories of these names, so one that leads elsewhere never gets in.
PlainName = Annotated[str, StringConstraints(pattern=r"^[\w][^/\\\x00-\x1f\x7f]*$", max_length=255)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
DtypeName = Annotated[
    str, StringConstraints(pattern=r"^(bool|u?int(8|16|32|64)|b?float\d{1,3}(_[a-z0-9]+)?|complex\d{2,3})$")
]


class StateRecord(Settings):
    """One state of one parameter, over all files."""

    dtype: DtypeName  # torch's name without the prefix: float32, bfloat16
    fingerprint: str | None = None  # 16 hexadecimal digits; None: the (foreign) format has none


class ParameterRecord(Settings):
    """One parameter of the model, over all files."""

    shape: Annotated[tuple[Count, ...], Field(max_length=64)]
    trainable: bool
    updates: Count  # optimizer updates so far; AdamW's bias correction needs the number
    states: dict[PlainName, StateRecord]
    is_buffer: bool = False  # in the module's state, but not trainable by an optimizer

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if prod(max(size, 1) for size in self.shape) > _MOST_ELEMENTS:
            raise ValueError(f"a shape of {self.shape} has more than {_MOST_ELEMENTS:,} elements")
        return self


class GroupRecord(Settings):
    """A DeepSpeed or torch parameter group: parameters and the settings that they share."""

    parameters: tuple[str, ...]  # in the group's order
    settings: dict[str, Any]  # lr, betas, eps, weight_decay ...: plain numbers


class FileRecord(Settings):
    """One rank's file: its content, and how to verify it."""

    # In the checkpoint's directory, or in ../, another of the same store: frozen weights are written once.
    name: str = Field(pattern=r"^(\.\./\w+/)?\w+\.safetensors$")
    num_bytes: Count
    checksum: str
    intervals: dict[PlainName, tuple[Count, Count]]  # parameter -> elements [start, stop), of every state


class BaseRecord(Settings):
    """The checkpoint, of any format, with the weights that this one leaves out: those of an adapter's model.

    Their records in the manifest have the fingerprints of what the run computed with, in its dtype.
    """

    path: str = Field(pattern=r"^[^\x00-\x1f]+$", max_length=4096)  # on a disk, absolute
    relative: str | None = Field(None, max_length=4096)  # the same from this checkpoint's directory
    parameters: tuple[PlainName, ...]  # whose weights it has

    @field_validator("path", "relative")
    @classmethod
    def _check_is_local(cls, path: str | None) -> str | None:
        if path is not None and "://" in path:
            raise ValueError("a base lies on a disk: no URL that a file names is opened")
        return path


class ProbeRecord(Settings):
    """The loss on a few fixed sequences, which a loaded checkpoint must reproduce."""

    loss: float
    num_sequences: Count  # the first ones of the training data
    param_dtype: str
    frozen_bits: int | None = None  # engine.frozen_bits


class TokenizerRecord(Settings):
    """The tokenizer that made the run's token ids."""

    fingerprint: str
    file: PlainName | None = None  # beside the manifest; None: the run had token shards only
    # Ids with which each document began in training, such as bos; None: unknown.
    document_start: Annotated[tuple[Count, ...], Field(max_length=8)] | None = None


class BestMetric(Settings):
    """The best value of a validation metric so far."""

    metric: str
    mode: Literal["min", "max"]  # whether less or more of it is better
    value: float | None  # None: there was no finite one
    step: Count  # of that evaluation
    evaluations_since: Count = 0


class Progress(Settings):
    """How far a run has trained.

    A resume needs this and the parameters only: data order and learning rates are functions of it.
    """

    step: Count = 0  # optimizer steps done, skipped ones included
    sequences_seen: Count = 0
    used: tuple[tuple[int, int], ...] = ()  # [start, stop) of the run's data order that ranks have used
    used_again: tuple[tuple[int, int], ...] = ()  # those that were used twice; empty unless there is a bug
    tokens_seen: Count = 0  # of all rows, without padding; of an older checkpoint: of targets
    skipped_steps: Count = 0  # gradients were not finite
    skipped_in_a_row: Count = 0
    steps_without_targets: Count = 0  # steps whose whole batch had no target, so they updated nothing
    loss_scale: dict[str, float] | None = None  # fp16 only
    objective_state: dict[str, list[float]] = Field({})  # what the objective remembers from step to step
    phase_starts: tuple[Count, ...] = ()  # the step from which each phase so far trains; empty: only one
    best_of_phase: BestMetric | None = None  # for `phases.N.until_stalled`
    best_of_run: BestMetric | None = None  # for `train.early_stopping`


class Manifest(Settings):
    """Everything about a checkpoint except its tensors."""

    format: Literal["distft-checkpoint"] = "distft-checkpoint"
    format_version: int = FORMAT_VERSION
    run_id: str
    progress: Progress
    config: dict[str, Any]  # resolved
    label_names: list[str] | dict[PlainName, list[str]] | None = None  # a mapping: of each data stream
    tokenizer: TokenizerRecord | None = None
    written_by: dict[str, Any]  # engine, world size, versions
    parameters: dict[PlainName, ParameterRecord]
    tied: dict[PlainName, PlainName] = Field({})  # further name of a parameter -> the name it is saved under
    groups: list[GroupRecord] = Field([])  # of trainable parameters; empty: grouped by config's optim
    probe: ProbeRecord | None = None
    data_fingerprint: str | None = None  # of the training data's content; None: unknown
    base: BaseRecord | None = None  # None: all weights are in `files`
    files: list[FileRecord]

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        names = [file.name for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError("two files have the same name")
        return self

    def to_bytes(self) -> bytes:
        """JSON whose last key is a checksum of the rest.

        Raises `CheckpointError` if the bytes could not be read again, such as for a text that is no Unicode.
        """
        body = self._body()
        data = body.removesuffix(_END) + f'{_CHECKSUM_KEY}"{checksum_of_bytes(body)}"'.encode() + _END
        try:
            Manifest.from_bytes(data, "The manifest")
        except CheckpointError as error:
            raise CheckpointError(
                "Nothing was committed, because nothing could read it again. Is a text of the configuration "
                f"or the labels no valid Unicode, such as a lone surrogate? {error}"
            ) from None
        return data

    def _body(self) -> bytes:
        """All but the checksum, as `_json` writes it, but 20 times as fast for the long list of files."""
        files = to_json(self.files, indent=1)
        if not files.isascii():  # `_json` escapes other characters
            return _json(self.model_dump(mode="json"))
        rest = _json(self.model_dump(mode="json", exclude={"files"}))
        return rest.removesuffix(_END) + b',\n "files": ' + files.replace(b"\n", b"\n ") + _END

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Parse the content of the file `where`.

        Raises `CheckpointError` if it is damaged or not a manifest, `UnsupportedFormatError` for a newer one.
        """
        body = _body_as_written(data)
        if body is None:
            body = _body_of_any_layout(data, where)
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            problems = "\n".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:_MOST_PROBLEMS]
            )
            raise CheckpointError(f"{where} is not a distft checkpoint's manifest:\n{problems}") from None


def _body_as_written(data: bytes) -> bytes | None:
    """The text without its checksum, if it is laid out as `to_bytes` does and undamaged; otherwise None.

    For 70B parameters at 512 ranks (24 MiB) this takes 5 ms; parsing, and writing it again, takes 3 s.
    """
    head = _HEAD.match(data)
    if head is None or int(head["version"]) > FORMAT_VERSION:
        return None
    kept, _, checksum = data.rpartition(_CHECKSUM_KEY.encode())
    body = kept + _END
    return body if checksum == f'"{checksum_of_bytes(body)}"'.encode() + _END else None


def _body_of_any_layout(data: bytes, where: str) -> bytes:
    """The text without its checksum, which was computed for the layout of `_json`."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
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
    body = _json(raw)
    if checksum != checksum_of_bytes(body):
        raise CheckpointError(
            f"{where} is damaged: its content does not match its checksum {checksum}; use another checkpoint."
        )
    return body


def _json(raw: dict[str, Any]) -> bytes:
    return json.dumps(raw, indent=1).encode()
