"""A model directory of transformers, read under our names: nothing is copied before it is asked for."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.formats.huggingface_config import read_shape
from distft.checkpoint.formats.huggingface_files import CONFIG_FILE, find_tensors, read_json
from distft.checkpoint.formats.huggingface_shape import HuggingFaceShape
from distft.checkpoint.formats.huggingface_tensors import Slot, TensorMap, base_prefix, map_tensors
from distft.checkpoint.formats.safetensors_file import TensorPlace
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import Manifest, ParameterRecord, Progress, StateRecord, TokenizerRecord
from distft.checkpoint.rank_file import read_elements
from distft.errors import CheckpointError, ConfigError, DataError
from distft.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.model"
LM_HEAD = "lm_head.weight"

_SLAB_BYTES = 16 << 20  # read at a time, where more than what is asked for must be read
# Buffers that older versions of transformers saved, and compute anew.
_BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Survey:
    """What lies in a directory, held against what its config.json promises."""

    tensors: TensorMap
    places: dict[str, TensorPlace]  # those that fit, by their name
    faults: list[str]


class HuggingFaceCheckpoint:
    """A `CheckpointSource` over `config.json` and safetensors, one file or several with an index.

    Weights only. A parameter whose tensor is absent or of another shape has no state; `faults` says why.
    """

    format = "huggingface"

    def __init__(self, path: str, shape: HuggingFaceShape, manifest: Manifest, survey: _Survey) -> None:
        self.path = path
        self.manifest = manifest
        self.model_shape = shape
        self._tensors = survey.tensors
        self._places = survey.places

    @classmethod
    def open(cls, path: str) -> "HuggingFaceCheckpoint":
        """The model at `path`; its headers are read, no weights.

        Raises `CheckpointError` where there is none, `ConfigError` for one with features that are not ours.
        """
        raw = read_json(storage.join(path, CONFIG_FILE))
        try:
            shape = read_shape(raw)
        except ConfigError as error:
            raise ConfigError(f"{storage.join(path, CONFIG_FILE)} is not a model of ours:\n{error}") from None
        survey = _survey(path, shape)
        return cls(path, shape, _manifest(path, shape, survey, raw), survey)

    def has(self, parameter: str, state: str) -> bool:
        record = self.manifest.parameters.get(parameter)
        return record is not None and state in record.states

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        record = self.manifest.parameters.get(parameter)
        return None if record is None else record.shape

    def updates(self, parameter: str) -> int:  # noqa: ARG002
        return 0

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        """As `StateSource.read`. A transposed tensor is read whole, 16 MiB at a time."""
        if not self.has(parameter, state):
            raise CheckpointError(f"{self.path} has no {state} of {parameter!r}.")
        slot = self._tensors.ours[parameter]
        place = self._places[slot.tensor.name]
        if slot.tensor.is_transposed:
            return _read_transposed(place, slot, start, stop)
        assert place.dtype is not None
        first = slot.row * (slot.tensor.numel // slot.tensor.shape[0]) + start
        return read_elements(
            place.path, place.offset + first * place.dtype.itemsize, place.dtype, stop - start
        )

    def faults(self) -> list[str]:
        """What is missing, cut short, too many, or of another shape, all of it.

        The format has no checksums: damaged numbers are seen in a stored copy of a tied head alone.
        """
        return _survey(self.path, self.model_shape, compare_tied=True).faults


def _read_transposed(place: TensorPlace, slot: Slot, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a parameter whose rows are columns of the tensor."""
    assert place.dtype is not None
    num_slab_rows, num_columns = slot.tensor.shape
    first, last = start // num_slab_rows, -(-stop // num_slab_rows)  # rows of ours
    out = torch.empty((last - first, num_slab_rows), dtype=place.dtype)
    row_bytes = num_columns * place.dtype.itemsize
    step = max(_SLAB_BYTES // row_bytes, 1)
    for row in range(0, num_slab_rows, step):
        count = min(step, num_slab_rows - row)
        slab = read_elements(place.path, place.offset + row * row_bytes, place.dtype, count * num_columns)
        columns = slab.view(count, num_columns)[:, slot.row + first : slot.row + last]
        out[:, row : row + count] = columns.T
    offset = first * num_slab_rows
    return out.view(-1)[start - offset : stop - offset]


def _survey(path: str, shape: HuggingFaceShape, *, compare_tied: bool = False) -> _Survey:
    found = find_tensors(path)
    tensors = map_tensors(
        shape.model,
        shape.architecture,
        shape.head,
        num_labels=len(shape.label_names or ()),
        # A model that was saved without a head has no prefix, and GPT-2 as OpenAI gave it out neither.
        has_prefix=any(
            name.startswith(base_prefix(shape.architecture)) for name in (*found.places, *found.lost)
        ),
    )
    faults = [*found.faults]
    if shape.model.tie_embeddings and LM_HEAD in found.places:
        copy = found.places.pop(LM_HEAD)
        embedding = found.places.setdefault(tensors.embedding, copy)
        if compare_tied and not _same_bytes(embedding, copy):
            faults.append(
                f"{copy.path}: {LM_HEAD} differs from {tensors.embedding}, though tie_word_embeddings is "
                "true: the model is damaged, or tie_word_embeddings must be false."
            )
    places = {}
    for name, tensor in tensors.theirs.items():
        place = found.places.pop(name, None)
        if place is None:
            if not found.explains(name):
                faults.append(f"{path} has no tensor {name} {list(tensor.shape)}.")
        elif place.shape != tensor.shape:
            faults.append(
                f"{place.path}: {name} is {list(place.shape)}, and {list(tensor.shape)} by {CONFIG_FILE}."
            )
        elif place.dtype is None:
            faults.append(f"{place.path}: {name} is of dtype {place.code}, in which weights are not read.")
        else:
            places[name] = place
    faults += [
        f"{place.path}: {name} {list(place.shape)} is no part of the model of {CONFIG_FILE}."
        for name, place in found.places.items()
        if not _BUFFERS.search(name)
    ]
    return _Survey(tensors=tensors, places=places, faults=faults)


def _same_bytes(one: TensorPlace, other: TensorPlace) -> bool:
    if one == other:
        return True
    if (one.code, one.shape) != (other.code, other.shape):
        return False
    num_bytes = one.stop - one.offset
    for start in range(0, num_bytes, _SLAB_BYTES):
        stop = min(start + _SLAB_BYTES, num_bytes)
        pieces = [storage.read_range(p.path, p.offset + start, p.offset + stop) for p in (one, other)]
        if pieces[0] != pieces[1]:
            return False
    return True


def _manifest(path: str, shape: HuggingFaceShape, survey: _Survey, raw: Mapping[str, Any]) -> Manifest:
    parameters = {}
    for name, slot in survey.tensors.ours.items():
        place = survey.places.get(slot.tensor.name)
        states = {}
        if place is not None:
            states[WEIGHT] = StateRecord(dtype=str(place.dtype).removeprefix("torch."))
        parameters[name] = ParameterRecord(shape=slot.shape, trainable=True, updates=0, states=states)
    is_tied = shape.model.tie_embeddings and shape.head == "language_model"
    return Manifest(
        run_id=path.rstrip("/").rpartition("/")[2],
        progress=Progress(),
        config={"model": shape.model.model_dump(mode="json")},
        label_names=None if shape.label_names is None else list(shape.label_names),
        tokenizer=_tokenizer(path),
        written_by={"architecture": shape.architecture, "transformers": raw.get("transformers_version")},
        parameters=parameters,
        tied={LM_HEAD: "embed.weight"} if is_tied else {},
        files=[],
    )


def _tokenizer(path: str) -> TokenizerRecord | None:
    """The sentencepiece model in the directory; other files of that name (tiktoken's, say) are not ours."""
    try:
        model = storage.read_bytes(storage.join(path, TOKENIZER_FILE))
        return TokenizerRecord(fingerprint=Tokenizer(model).fingerprint, file=TOKENIZER_FILE)
    except (FileNotFoundError, DataError):
        return None
