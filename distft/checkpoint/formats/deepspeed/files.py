"""The model and optimizer files of one DeepSpeed checkpoint: names, completeness, contents."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distft import storage
from distft.checkpoint.formats.deepspeed.contents import ModelFile, parse_content
from distft.checkpoint.formats.names import LATEST, MODEL_STATES, has_model_states, list_tags
from distft.checkpoint.formats.torch_file import read_torch_file
from distft.checkpoint.manifest import PlainName
from distft.errors import CheckpointError, ErrorCollector, UnsupportedFormatError

MODEL_FILE = "mp_rank_00_model_states.pt"
_OPTIMIZER_NAME = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp_rank>\d+)_?optim_states\.pt"
)
_MAX_TAG_BYTES = 4096
_MOST_TAGS = 12  # in a message
_MOST_RANKS = 10
_UNSUPPORTED_PREFIXES = {
    "layer_": "pipeline stages or mixture-of-experts layers",
    "expp_rank_": "mixture-of-experts layers",
    "offloaded_tensors": "optimizer states offloaded to NVMe",
}


def stage3_model_file(rank: int) -> str:
    """Name of a rank's model file at stage 3."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def optimizer_file(rank: int, *, is_bf16: bool) -> str:
    """Name of a rank's optimizer file at stages 1 to 3."""
    return f"{'bf16_' if is_bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def find_tag_directory(path: str, latest: str = LATEST) -> str:
    """The directory of one tag: the one that the file `latest` in `path` names, else `path` itself.

    Raises `CheckpointError` if neither is the directory of a DeepSpeed checkpoint.
    """
    pointer = storage.join(path, latest)
    if not storage.exists(pointer):
        if has_model_states(path):
            return path
        if tags := list_tags(path):
            raise CheckpointError(
                f"{path} has no file {latest!r}, which DeepSpeed writes when a checkpoint is complete. "
                f"It has the tags {', '.join(tags[-_MOST_TAGS:])}: name the directory of one, such as "
                f"{storage.join(path, tags[-1])}."
            )
        raise CheckpointError(
            f"{path} is not a DeepSpeed checkpoint: it has neither a file {latest!r} nor *_model_states.pt. "
            "Give the directory passed to engine.save_checkpoint, or the directory of one tag in it."
        )
    local = storage.local_path(pointer)
    if (local is not None and not local.is_file()) or storage.size(pointer) > _MAX_TAG_BYTES:
        raise CheckpointError(f"{pointer} is no short file with the name of a tag. Name a tag's directory.")
    tag = storage.read_bytes(pointer).decode(errors="replace").strip()
    try:
        directory = storage.join(path, TypeAdapter(PlainName).validate_python(tag))
    except ValidationError:
        raise CheckpointError(
            f"{pointer} names {tag[:80]!r}, which is no name of a directory. Name a tag's directory."
        ) from None
    if not storage.list_names(directory):
        others = list_tags(path) or storage.list_names(path)
        raise CheckpointError(
            f"{pointer} names the tag {tag!r}, which does not exist: name the directory of another tag. "
            f"{path} contains {', '.join(others[:_MOST_TAGS])}."
        )
    return directory


@dataclass(slots=True)
class DeepSpeedFiles:
    """Names of one checkpoint's files by rank. `model` has only rank 0 if all ranks share one model file."""

    path: str
    model: dict[int, str] = field(default_factory=dict)
    optimizer: dict[int, str] = field(default_factory=dict)
    is_stage3: bool = False  # each rank has a model file of its own

    @classmethod
    def find(cls, path: str) -> "DeepSpeedFiles":
        """List the files in a tag's directory.

        Raises `CheckpointError` without a model file, and for pipeline, tensor or expert parallelism.
        """
        found, errors = cls(path), ErrorCollector()
        for name in storage.list_names(path):
            with errors.collect():
                found._add(name)
        errors.raise_if_any()
        if not found.model:
            raise CheckpointError(f"{path} is not a DeepSpeed checkpoint: it has no *_model_states.pt.")
        return found

    def _add(self, name: str) -> None:
        for prefix, content in _UNSUPPORTED_PREFIXES.items():
            if name.startswith(prefix):
                raise UnsupportedFormatError(
                    f"{storage.join(self.path, name)} contains {content}, which distft does not read: "
                    "convert the checkpoint with DeepSpeed's own ds_to_universal or zero_to_fp32."
                )
        model, optimizer = MODEL_STATES.fullmatch(name), _OPTIMIZER_NAME.fullmatch(name)
        match = model or optimizer
        if match is None:
            return
        if int(match["mp_rank"]):
            raise UnsupportedFormatError(
                f"{storage.join(self.path, name)} belongs to a tensor- or pipeline-parallel model, "
                "which distft does not read: convert it with DeepSpeed's ds_to_universal."
            )
        table = self.model if model else self.optimizer
        rank = int(match["rank"] or 0)
        if rank in table:
            raise CheckpointError(
                f"{self.path} contains {table[rank]} and {name}, two files of rank {rank} from different "
                "runs: remove the one that does not belong to this checkpoint."
            )
        table[rank] = name
        self.is_stage3 = self.is_stage3 or bool(model and match["rank"])

    def file_path(self, name: str) -> str:
        return storage.join(self.path, name)

    def paths(self) -> list[str]:
        return [self.file_path(name) for name in (*self.model.values(), *self.optimizer.values())]

    def read(self, *, trust: bool) -> tuple[dict[int, ModelFile], dict[int, dict[str, Any]]]:
        """Contents of the model files, and the raw contents of the optimizer files, by rank.

        Raises `CheckpointError` with every file that is damaged, missing, or of another world size.
        """
        errors = ErrorCollector()
        models = self.read_models(errors, trust=trust)
        optimizers: dict[int, dict[str, Any]] = {}
        for rank, name in sorted(self.optimizer.items()):
            with errors.collect():
                raw = read_torch_file(self.file_path(name), trust=trust)
                optimizers[rank] = _require_dict(raw, "optimizer_state_dict", self.file_path(name))
                _require_dict(raw["optimizer_state_dict"], "", self.file_path(name))
        if models:
            with errors.collect():
                self._check_ranks(next(iter(models.values())))
        errors.raise_if_any()
        return models, optimizers

    def read_models(self, errors: ErrorCollector, *, trust: bool) -> dict[int, ModelFile]:
        """Contents of the model files by rank; adds what is wrong with the others to `errors`."""
        models: dict[int, ModelFile] = {}
        for rank, name in sorted(self.model.items()):
            path = self.file_path(name)
            with errors.collect():
                content = _require_dict(read_torch_file(path, trust=trust), "module", path)
                models[rank] = parse_content(ModelFile, content, path)
        return models

    def _check_ranks(self, model: ModelFile) -> None:
        """Compare the ranks that have files with the world size that `model` records."""
        problems = []
        has_optimizer = model.param_shapes is not None and model.optimizer is None
        for kind, found, world_size in (
            ("model", self.model, model.dp_world_size if self.is_stage3 else 1),
            ("optimizer", self.optimizer, model.dp_world_size if has_optimizer else None),
        ):
            if world_size is None:
                continue
            num_missing = world_size - sum(rank < world_size for rank in found)
            # A damaged world size can be huge: name only the first ranks.
            missing = list(islice((rank for rank in range(world_size) if rank not in found), _MOST_RANKS))
            if num_missing:
                verb = "is" if num_missing == 1 else "are"
                problems.append(f"the {_describe_files(kind, missing, num_missing)} {verb} missing")
            if foreign := sorted(rank for rank in found if rank >= world_size):
                verb = "does" if len(foreign) == 1 else "do"
                problems.append(f"the {_describe_files(kind, foreign, len(foreign))} {verb} not belong to it")
        if problems:
            raise CheckpointError(
                f"{self.path} was written by {model.dp_world_size} ranks, but {' and '.join(problems)}: "
                "copy it again with all of its files, or use another checkpoint."
            )


def _describe_files(kind: str, ranks: Sequence[int], count: int) -> str:
    plural, shown = "s" * (count > 1), ranks[:_MOST_RANKS]
    more = f" and {count - len(shown):,} more" if count > len(shown) else ""
    return f"{kind} file{plural} of rank{plural} {', '.join(map(str, shown))}{more}"


def _require_dict(content: Any, key: str, path: str) -> dict[str, Any]:
    if not isinstance(content, dict) or (key and key not in content):
        raise CheckpointError(f"{path} has no {key or 'state'!r}: DeepSpeed did not write it.")
    return content
