"""The model and optimizer files of one DeepSpeed checkpoint: names, completeness, contents."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distft import storage
from distft.checkpoint.formats.names import LATEST
from distft.checkpoint.formats.torch_file import find_torch_file_damage, read_torch_file
from distft.errors import CheckpointError, ErrorCollector, UnsupportedFormatError

MODEL_FILE = "mp_rank_00_model_states.pt"
_MODEL_NAME = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp_rank>\d+)_model_states\.pt")
_OPTIMIZER_NAME = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp_rank>\d+)_?optim_states\.pt"
)
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
    try:
        tag = storage.read_bytes(storage.join(path, latest)).decode(errors="replace").strip()
    except FileNotFoundError:
        if any(_MODEL_NAME.fullmatch(name) for name in storage.list_names(path)):
            return path
        raise CheckpointError(
            f"{path} is not a DeepSpeed checkpoint: it has neither a file {latest!r} nor *_model_states.pt. "
            "Give the directory passed to engine.save_checkpoint, or the directory of one tag in it."
        ) from None
    directory = storage.join(path, tag)
    if not tag or not storage.list_names(directory):
        raise CheckpointError(
            f"{storage.join(path, latest)} names the tag {tag!r}, which does not exist: "
            f"give the directory of another tag. {path} contains {', '.join(storage.list_names(path))}."
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
        model, optimizer = _MODEL_NAME.fullmatch(name), _OPTIMIZER_NAME.fullmatch(name)
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

    def names(self) -> list[str]:
        return [*self.model.values(), *self.optimizer.values()]

    def read(self, *, trust: bool) -> tuple[dict[int, Any], dict[int, Any]]:
        """Contents of the model files and of the optimizer files, by rank.

        Raises `CheckpointError` with every file that is damaged, missing, or of another world size.
        """
        errors = ErrorCollector()
        models: dict[int, Any] = {}
        optimizers: dict[int, Any] = {}
        for names, contents, key in (
            (self.model, models, "module"),
            (self.optimizer, optimizers, "optimizer_state_dict"),
        ):
            for rank, name in sorted(names.items()):
                with errors.collect():
                    contents[rank] = _read_with_key(self.file_path(name), key, trust=trust)
        if models:
            with errors.collect():
                self._check_ranks(next(iter(models.values())))
        errors.raise_if_any()
        return models, optimizers

    def _check_ranks(self, model: Mapping[str, Any]) -> None:
        """Compare the ranks that have files with the world size that `model` records."""
        world_size = model.get("dp_world_size")
        if not isinstance(world_size, int) or world_size < 1:
            raise CheckpointError(
                f"{self.path} has dp_world_size={world_size!r}: it is damaged, or DeepSpeed did not write it."
            )
        expected = set(range(world_size))
        expected_by_kind = {"model": expected if self.is_stage3 else {0}}
        if model.get("param_shapes") is not None and model.get("optimizer") is None:
            expected_by_kind["optimizer"] = expected
        problems = []
        for kind, ranks in expected_by_kind.items():
            found = set(self.model if kind == "model" else self.optimizer)
            if ranks - found:
                verb = "is" if len(ranks - found) == 1 else "are"
                problems.append(f"the {_describe_files(kind, ranks - found)} {verb} missing")
            if found - ranks:
                verb = "does" if len(found - ranks) == 1 else "do"
                problems.append(f"the {_describe_files(kind, found - ranks)} {verb} not belong to it")
        if problems:
            raise CheckpointError(
                f"{self.path} was written by {world_size} ranks, but {' and '.join(problems)}: "
                "copy it again with all of its files, or use another checkpoint."
            )

    def find_damage(self) -> list[str]:
        """Files that are missing, or whose bytes do not match their checksums; reads all of them."""
        return [problem for name in self.names() for problem in find_torch_file_damage(self.file_path(name))]


def _describe_files(kind: str, ranks: set[int]) -> str:
    plural = "s" * (len(ranks) > 1)
    return f"{kind} file{plural} of rank{plural} {', '.join(map(str, sorted(ranks)))}"


def _read_with_key(path: str, key: str, *, trust: bool) -> Any:
    content = read_torch_file(path, trust=trust)
    if not isinstance(content, dict) or key not in content:
        raise CheckpointError(f"{path} has no {key!r}: DeepSpeed did not write it.")
    return content
