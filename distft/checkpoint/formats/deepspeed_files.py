"""The files of one DeepSpeed checkpoint: which there are, which there must be, and what they hold."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distft import storage
from distft.checkpoint.formats.torch_file import read_torch_file, torch_file_faults
from distft.checkpoint.unread import UnreadError
from distft.errors import CheckpointError, Mistakes

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
MODEL_FILE = "mp_rank_00_model_states.pt"
_MODEL_NAME = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<mp_rank>\d+)_model_states\.pt")
_OPTIMIZER_NAME = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp_rank>\d+)_?optim_states\.pt"
)
_FOREIGN_NAMES = {
    "layer_": "pipeline stages or experts",
    "expp_rank_": "experts",
    "offloaded_tensors": "optimizer states that were offloaded to NVMe",
}


def sliced_model_file(rank: int) -> str:
    """The name of a rank's model file at stage 3."""
    return f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def optimizer_file(rank: int, *, is_bf16: bool) -> str:
    """The name of a rank's optimizer file at stages 1 to 3."""
    return f"{'bf16_' if is_bf16 else ''}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def find_tag(path: str, latest: str = LATEST) -> str:
    """The directory of one checkpoint: `path` itself, or the one that the file `latest` in it names."""
    try:
        tag = storage.read_bytes(storage.join(path, latest)).decode(errors="replace").strip()
    except FileNotFoundError:
        if any(_MODEL_NAME.fullmatch(name) for name in storage.list_names(path)):
            return path
        raise CheckpointError(
            f"{path} holds neither a file {latest!r} nor *_model_states.pt, so no DeepSpeed checkpoint: "
            "give the directory that engine.save_checkpoint was given, or one tag's directory in it."
        ) from None
    directory = storage.join(path, tag)
    if not tag or not storage.list_names(directory):
        raise CheckpointError(
            f"{storage.join(path, latest)} names the checkpoint {tag!r}, and there is none: "
            f"give the directory of another tag; {path} holds {', '.join(storage.list_names(path))}."
        )
    return directory


@dataclass(slots=True)
class TagFiles:
    """The files of one checkpoint by rank. `model` has rank 0 alone where all ranks share its file."""

    path: str
    model: dict[int, str] = field(default_factory=dict)
    optimizer: dict[int, str] = field(default_factory=dict)
    is_sliced: bool = False  # whether each rank has a model file of its own: stage 3

    @classmethod
    def find(cls, path: str) -> "TagFiles":
        """The files in a tag's directory. Raises `CheckpointError` for layouts that are not read here."""
        found, mistakes = cls(path), Mistakes()
        for name in storage.list_names(path):
            with mistakes.gather():
                found._add(name)
        mistakes.raise_if_any()
        if not found.model:
            raise CheckpointError(f"{path} holds no *_model_states.pt: no DeepSpeed checkpoint is there.")
        return found

    def _add(self, name: str) -> None:
        for prefix, what in _FOREIGN_NAMES.items():
            if name.startswith(prefix):
                raise UnreadError(
                    f"{storage.join(self.path, name)} belongs to {what}, which are not read here: "
                    "convert the checkpoint with DeepSpeed's own ds_to_universal or zero_to_fp32."
                )
        model, optimizer = _MODEL_NAME.fullmatch(name), _OPTIMIZER_NAME.fullmatch(name)
        match = model or optimizer
        if match is None:
            return
        if int(match["mp_rank"]):
            raise UnreadError(
                f"{storage.join(self.path, name)} belongs to a model that is split over ranks by tensors or "
                "layers, which is not read here: convert it with DeepSpeed's ds_to_universal."
            )
        table = self.model if model else self.optimizer
        rank = int(match["rank"] or 0)
        if rank in table:
            raise CheckpointError(
                f"{self.path} holds {table[rank]} and {name}, two files of rank {rank} from different runs: "
                "remove the one that does not belong there."
            )
        table[rank] = name
        self.is_sliced = self.is_sliced or bool(model and match["rank"])

    def file_path(self, name: str) -> str:
        return storage.join(self.path, name)

    def names(self) -> list[str]:
        return [*self.model.values(), *self.optimizer.values()]

    def read(self, *, trust: bool) -> tuple[dict[int, Any], dict[int, Any]]:
        """What the model and the optimizer files hold, by rank.

        Raises `CheckpointError` with every file that is damaged, missing, or of another number of ranks.
        """
        mistakes = Mistakes()
        models: dict[int, Any] = {}
        optimizers: dict[int, Any] = {}
        for names, contents, key in (
            (self.model, models, "module"),
            (self.optimizer, optimizers, "optimizer_state_dict"),
        ):
            for rank, name in sorted(names.items()):
                with mistakes.gather():
                    contents[rank] = _checked(self.file_path(name), key, trust=trust)
        if models:
            with mistakes.gather():
                self._check_ranks(next(iter(models.values())))
        mistakes.raise_if_any()
        return models, optimizers

    def _check_ranks(self, model: Mapping[str, Any]) -> None:
        """Hold the ranks of the files against the number of ranks that the checkpoint tells of itself."""
        world_size = model.get("dp_world_size")
        if not isinstance(world_size, int) or world_size < 1:
            raise CheckpointError(
                f"{self.path} tells dp_world_size={world_size!r}: it is damaged, or not DeepSpeed's."
            )
        expected = set(range(world_size))
        wanted = {"model": expected if self.is_sliced else {0}}
        if model.get("param_shapes") is not None and model.get("optimizer") is None:
            wanted["optimizer"] = expected
        faults = []
        for kind, ranks in wanted.items():
            there = set(self.model if kind == "model" else self.optimizer)
            if ranks - there:
                verb = "is" if len(ranks - there) == 1 else "are"
                faults.append(f"the {_files_of(kind, ranks - there)} {verb} missing")
            if there - ranks:
                verb = "is a" if len(there - ranks) == 1 else "are"
                faults.append(f"there {verb} {_files_of(kind, there - ranks)} besides")
        if faults:
            raise CheckpointError(
                f"{self.path} was written by {world_size} ranks, but {' and '.join(faults)}: "
                "copy it again with all of its files, or use another checkpoint."
            )

    def faults(self) -> list[str]:
        """Files that have gone, or whose bytes are not what was written; all of them are read."""
        return [fault for name in self.names() for fault in torch_file_faults(self.file_path(name))]


def _files_of(kind: str, ranks: set[int]) -> str:
    plural = "s" * (len(ranks) > 1)
    return f"{kind} file{plural} of rank{plural} {', '.join(map(str, sorted(ranks)))}"


def _checked(path: str, key: str, *, trust: bool) -> Any:
    content = read_torch_file(path, trust=trust)
    if not isinstance(content, dict) or key not in content:
        raise CheckpointError(f"{path} has no {key!r}: DeepSpeed did not write it.")
    return content
