"""What `engine.save_checkpoint` of plain DeepSpeed wrote, as a source of state by name and interval."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch

from distft.checkpoint.formats.deepspeed_files import TagFiles, find_tag
from distft.checkpoint.formats.deepspeed_model import ModelReading, ScriptState, build_manifest
from distft.checkpoint.formats.deepspeed_optimizer import read_flat, read_sliced, read_whole
from distft.checkpoint.formats.pieces import Pieces, PiecewiseSource
from distft.checkpoint.formats.torch_file import ForeignObject
from distft.checkpoint.manifest import Manifest
from distft.errors import CheckpointError


class DeepSpeedCheckpoint(PiecewiseSource):
    """A checkpoint of plain DeepSpeed: ZeRO stages 0 to 3, any number of data-parallel ranks."""

    format = "deepspeed"

    def __init__(self, files: TagFiles, manifest: Manifest, pieces: Pieces, script: ScriptState) -> None:
        super().__init__(files.path, manifest, pieces)
        self.script = script
        self._files = files

    @classmethod
    def open(
        cls, path: str, *, trust: bool = False, groups: Sequence[Sequence[str]] | None = None
    ) -> "DeepSpeedCheckpoint":
        """The checkpoint that `path` means: one tag's directory, or the one that `latest` there names.

        `trust` lets unknown classes in the files be imported, which can run code. `groups` are the names of
        each optimizer group's parameters; only stage 0 may need them, whose files keep numbers.
        Raises `CheckpointError` with everything that is missing, damaged or not of plain DeepSpeed.
        """
        files = TagFiles.find(find_tag(path))
        models, optimizers = files.read(trust=trust)
        try:
            return cls._from_content(files, models, optimizers, groups)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{files.path} is not laid out as DeepSpeed 0.19 does it ({type(error).__name__}: {error}): "
                "it is damaged, or of a version that is not known here."
            ) from error

    @classmethod
    def _from_content(
        cls,
        files: TagFiles,
        models: Mapping[int, Mapping[str, Any]],
        optimizers: Mapping[int, Mapping[str, Any]],
        groups: Sequence[Sequence[str]] | None,
    ) -> "DeepSpeedCheckpoint":
        model = models[0]
        reading = ModelReading.of(models, is_sliced=files.is_sliced)
        by_rank = [optimizers[rank] for rank in sorted(optimizers)]
        saved: Mapping[str, Any]
        if not by_rank:
            zero_stage, saved = 0, model["optimizer"] or {}
            candidates = {n: t for n, t in reading.module.items() if n not in reading.buffers}
            trained = read_whole(model, candidates, files.path, groups)
        else:
            saved = by_rank[0]["optimizer_state_dict"]
            zero_stage = int(saved.get("zero_stage", 1))  # BF16_Optimizer, of stage 1 alone, does not tell
            _check_partitions(by_rank, model["dp_world_size"], files.path)
            read = read_sliced if files.is_sliced else read_flat
            trained = read(model, by_rank, files.path)
        scaler = saved.get("loss_scaler", saved)
        manifest, pieces = build_manifest(
            model,
            reading,
            trained,
            run_id=PurePosixPath(files.path).name,
            loss_scale=_loss_scale(scaler) if reading.param_dtype == torch.float16 else None,
            zero_stage=zero_stage,
        )
        return cls(files, manifest, pieces, ScriptState.of(model, scaler))

    def faults(self) -> list[str]:
        """What is wrong with its files now: each is read whole, and held against the checksums of its zip."""
        return self._files.faults()


def _check_partitions(optimizers: Sequence[Mapping[str, Any]], world_size: int, where: str) -> None:
    for rank, optimizer in enumerate(optimizers):
        counts = optimizer["optimizer_state_dict"].get("partition_count", world_size)
        for count in counts if isinstance(counts, list) else [counts]:
            if count != world_size:
                raise CheckpointError(
                    f"{where}: the optimizer file of rank {rank} belongs to {count} ranks, the model file to "
                    f"{world_size}: files of different runs are mixed there."
                )


def _loss_scale(scaler: ForeignObject | Mapping[str, Any]) -> dict[str, float] | None:
    """Our record of a loss scale, from DeepSpeed's scaler object or stage 0's plain numbers."""
    fields = scaler.fields if isinstance(scaler, ForeignObject) else scaler
    if "cur_scale" not in fields:
        return None
    since_overflow = fields.get("cur_iter", 0) - fields.get("last_overflow_iter", -1) - 1
    return {
        "scale": float(fields["cur_scale"]),
        "good_steps": since_overflow % fields.get("scale_window", 1000),
        "tolerance": fields.get("cur_hysteresis", 1),
    }
