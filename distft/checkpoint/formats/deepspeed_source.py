"""Reads checkpoints that DeepSpeed's `engine.save_checkpoint` wrote, at ZeRO stages 0 to 3."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch

from distft.checkpoint.formats.deepspeed_files import DeepSpeedFiles, find_tag_directory
from distft.checkpoint.formats.deepspeed_model import ExtraState, ModelStates, build_manifest
from distft.checkpoint.formats.deepspeed_optimizer import read_stage0, read_stage3, read_stage12
from distft.checkpoint.formats.segments import SegmentedSource, SegmentTable
from distft.checkpoint.formats.torch_values import OpaqueObject
from distft.checkpoint.manifest import Manifest
from distft.errors import CheckpointError


class DeepSpeedCheckpoint(SegmentedSource):
    """A DeepSpeed checkpoint of ZeRO stage 0 to 3, from any number of data-parallel ranks."""

    format = "deepspeed"

    def __init__(
        self, files: DeepSpeedFiles, manifest: Manifest, segments: SegmentTable, extra_state: ExtraState
    ) -> None:
        super().__init__(files.path, manifest, segments)
        self.extra_state = extra_state
        self._files = files

    @classmethod
    def open(
        cls, path: str, *, trust: bool = False, groups: Sequence[Sequence[str]] | None = None
    ) -> "DeepSpeedCheckpoint":
        """Open a tag's directory, or the tag that the file `latest` in `path` names.

        `trust` imports unknown classes that the files name, which can run code. `groups` are the names of
        each optimizer group's parameters; only stage 0 may need them, as its files number the parameters.
        Raises `CheckpointError` with everything that is missing, damaged or unsupported.
        """
        files = DeepSpeedFiles.find(find_tag_directory(path))
        models, optimizers = files.read(trust=trust)
        try:
            return cls._from_contents(files, models, optimizers, groups)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{files.path} does not have the layout of DeepSpeed 0.19 ({type(error).__name__}: {error}): "
                "it is damaged, or a version of DeepSpeed wrote it that distft does not know."
            ) from error

    @classmethod
    def _from_contents(
        cls,
        files: DeepSpeedFiles,
        models: Mapping[int, Mapping[str, Any]],
        optimizers: Mapping[int, Mapping[str, Any]],
        groups: Sequence[Sequence[str]] | None,
    ) -> "DeepSpeedCheckpoint":
        model = models[0]
        model_states = ModelStates.of(models, is_stage3=files.is_stage3)
        by_rank = [optimizers[rank] for rank in sorted(optimizers)]
        saved: Mapping[str, Any]
        if not by_rank:
            zero_stage, saved = 0, model["optimizer"] or {}
            parameters = {n: t for n, t in model_states.module.items() if n not in model_states.buffers}
            optimizer_states = read_stage0(model, parameters, files.path, groups)
        else:
            saved = by_rank[0]["optimizer_state_dict"]
            zero_stage = int(saved.get("zero_stage", 1))  # BF16_Optimizer, always stage 1, does not save it
            _check_partitions(by_rank, model["dp_world_size"], files.path)
            read = read_stage3 if files.is_stage3 else read_stage12
            optimizer_states = read(model, by_rank, files.path)
        scaler = saved.get("loss_scaler", saved)
        manifest, segments = build_manifest(
            model,
            model_states,
            optimizer_states,
            run_id=PurePosixPath(files.path).name,
            loss_scale=_loss_scale(scaler) if model_states.param_dtype == torch.float16 else None,
            zero_stage=zero_stage,
        )
        return cls(files, manifest, segments, ExtraState.of(model, scaler))

    def find_damage(self) -> list[str]:
        """Problems of its files: each is read whole and compared with the CRC-32s of its zip entries."""
        return self._files.find_damage()


def _check_partitions(optimizers: Sequence[Mapping[str, Any]], world_size: int, path: str) -> None:
    for rank, optimizer in enumerate(optimizers):
        counts = optimizer["optimizer_state_dict"].get("partition_count", world_size)
        for count in counts if isinstance(counts, list) else [counts]:
            if count != world_size:
                raise CheckpointError(
                    f"{path}: {count} ranks wrote the optimizer file of rank {rank}, but {world_size} wrote "
                    "the model file: the directory mixes files of different runs."
                )


def _loss_scale(scaler: OpaqueObject | Mapping[str, Any]) -> dict[str, float] | None:
    """`Progress.loss_scale` from DeepSpeed's scaler object, or from the numbers that stage 0 saves."""
    fields = scaler.fields if isinstance(scaler, OpaqueObject) else scaler
    if "cur_scale" not in fields:
        return None
    since_overflow = fields.get("cur_iter", 0) - fields.get("last_overflow_iter", -1) - 1
    return {
        "scale": float(fields["cur_scale"]),
        "good_steps": since_overflow % fields.get("scale_window", 1000),
        "tolerance": fields.get("cur_hysteresis", 1),
    }
