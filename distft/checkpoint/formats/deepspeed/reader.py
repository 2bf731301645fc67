"""Reads checkpoints that DeepSpeed's `engine.save_checkpoint` wrote, at ZeRO stages 0 to 3."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch

from distft.checkpoint.formats.deepspeed.consistency import (
    check_common,
    check_copies,
    check_progress,
    compare_weights,
)
from distft.checkpoint.formats.deepspeed.contents import (
    ExtraState,
    LossScaler,
    ModelFile,
    parse_content,
    unknown_layout_as_checkpoint_error,
)
from distft.checkpoint.formats.deepspeed.files import DeepSpeedFiles, find_tag_directory
from distft.checkpoint.formats.deepspeed.model import ModelStates, build_manifest
from distft.checkpoint.formats.deepspeed.segments import SegmentedSource
from distft.checkpoint.formats.deepspeed.stage0_reader import read_stage0
from distft.checkpoint.formats.deepspeed.writer_state import WRITTEN_BY_DISTFT
from distft.checkpoint.formats.deepspeed.zero_reader import OptimizerStates, read_stage3, read_stage12
from distft.checkpoint.formats.torch_file.values import OpaqueObject
from distft.errors import ErrorCollector, UnsupportedFormatError


class DeepSpeedCheckpoint(SegmentedSource):
    """A DeepSpeed checkpoint of ZeRO stage 0 to 3, from any number of data-parallel ranks."""

    format = "deepspeed"

    @classmethod
    def open(
        cls,
        path: str,
        *,
        trust: bool = False,
        groups: Sequence[Sequence[str]] | None = None,
        weights_only: bool = False,
    ) -> "DeepSpeedCheckpoint":
        """Open a tag's directory, or the tag that the file `latest` in `path` names.

        `trust` imports unknown classes that the files name, which can run code. `groups` are the names of
        each optimizer group's parameters; only stage 0 may need them, as its files number the parameters.
        With `weights_only`, a checkpoint that lacks them is opened without the optimizer's states. Raises
        `CheckpointError` with everything that is missing, damaged, unsupported, or of another tag.
        """
        files = DeepSpeedFiles.find(find_tag_directory(path))
        models, optimizers = files.read(trust=trust)
        with unknown_layout_as_checkpoint_error(files.path):
            check_common(files, models, optimizers)
            return cls._from_contents(files, models, optimizers, groups, weights_only=weights_only)

    @classmethod
    def _from_contents(
        cls,
        files: DeepSpeedFiles,
        models: Mapping[int, ModelFile],
        optimizers: Mapping[int, Mapping[str, Any]],
        groups: Sequence[Sequence[str]] | None,
        *,
        weights_only: bool,
    ) -> "DeepSpeedCheckpoint":
        model, notes = models[0], list[str]()
        model_states = ModelStates.of(models, files.path, is_stage3=files.is_stage3)
        states = [optimizers[rank]["optimizer_state_dict"] for rank in sorted(optimizers)]
        if states:
            saved = states[0]
            zero_stage = int(saved.get("zero_stage", 1))  # BF16_Optimizer, always stage 1, does not save it
            read = read_stage3 if files.is_stage3 else read_stage12
            optimizer_states = read(model.param_shapes or (), states, files.path)
        else:
            zero_stage, saved = 0, model.optimizer or {}
            parameters = {n: t for n, t in model_states.module.items() if n not in model_states.buffers}
            try:
                optimizer_states = read_stage0(model, parameters, files.path, groups)
            except UnsupportedFormatError as error:
                if not weights_only:
                    raise
                optimizer_states = OptimizerStates()
                notes.append(f"Only the weights were read: {error}")
        scaler = saved.get("loss_scaler", saved)
        manifest, segments = build_manifest(
            model,
            model_states,
            optimizer_states,
            run_id=PurePosixPath(files.path).name,
            loss_scale=_loss_scale(scaler, files.path) if model_states.param_dtype == torch.float16 else None,
            zero_stage=zero_stage,
        )
        if states:
            notes += _check_values(files, models, states, model_states, optimizer_states)
        checkpoint = cls(files.path, manifest, segments, ExtraState.of(model, scaler), files.paths())
        checkpoint.notes += notes
        return checkpoint


def _check_values(
    files: DeepSpeedFiles,
    models: Mapping[int, ModelFile],
    states: Sequence[Mapping[str, Any]],
    model_states: ModelStates,
    optimizer_states: OptimizerStates,
) -> list[str]:
    """Compare the values in the files; returns what could not be compared."""
    errors, notes = ErrorCollector(), list[str]()
    key = "fp32_flat_groups" if files.is_stage3 else "single_partition_of_fp32_groups"
    with errors.collect():
        masters = {files.file_path(files.optimizer[rank]): s[key] for rank, s in enumerate(states)}
        check_copies("partitions of weights", masters)
    with errors.collect():
        fragments = {
            files.file_path(files.model[rank]): list((model.frozen_param_fragments or {}).values())
            for rank, model in models.items()
        }
        check_copies("partitions of frozen weights", fragments)
    with errors.collect():
        if not files.is_stage3:  # at stage 3 the module is empty
            notes += compare_weights(files.path, optimizer_states.segments, model_states.module)
        updates = optimizer_states.updates.values()
        # At stages 1 and 2 the weights are the evidence, in files of distft its mark.
        is_certain = not files.is_stage3 or WRITTEN_BY_DISTFT in (models[0].ds_config or ())
        note = check_progress(files.path, models[0], updates, is_certain=is_certain)
        notes += [note] if note else []
    errors.raise_if_any()
    if files.is_stage3 and len(states) > 1:
        notes.append(
            "At stage 3 files name neither their rank nor their run: ranks' files that were exchanged, "
            "or that are of another run with equal settings and counts, cannot be found."
        )
    return notes


def _loss_scale(scaler: OpaqueObject | Mapping[str, Any], path: str) -> dict[str, float] | None:
    """`Progress.loss_scale` from DeepSpeed's scaler object, or from the numbers that stage 0 saves."""
    raw = dict(scaler.fields if isinstance(scaler, OpaqueObject) else scaler)
    found = parse_content(LossScaler, raw, path)
    if found.cur_scale is None:
        return None
    since_overflow = found.cur_iter - found.last_overflow_iter - 1
    return {
        "scale": found.cur_scale,
        "good_steps": since_overflow % found.scale_window,
        "tolerance": found.cur_hysteresis,
    }
