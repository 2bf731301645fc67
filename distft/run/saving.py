"""What a run puts into a checkpoint."""

import platform
from typing import Any

import torch

import distft
from distft.checkpoint.manifest import GroupRecord, ProbeRecord, Progress, TokenizerRecord
from distft.checkpoint.store import Draft, ParameterInfo, RunRecord
from distft.config import redact
from distft.engine.interface import Engine
from distft.optim.groups import parameter_groups
from distft.run.inputs import TOKENIZER_FILE, Inputs


def draft(
    inputs: Inputs, engine: Engine, progress: Progress, probe: ProbeRecord, *, run_id: str, world_size: int
) -> Draft:
    """This rank's part of a checkpoint. Its fragments are views of live state: copy or write them at once."""
    updates = engine.updates()
    return Draft(
        progress=progress,
        fragments=list(engine.fragments()),
        parameters={
            name: ParameterInfo(shape, name in inputs.trainable, updates.get(name, 0))
            for name, shape in inputs.shapes.items()
        },
        record=RunRecord(
            run_id=run_id,
            config=dict(redact(inputs.config.model_dump(mode="json"))),
            label_names=None if inputs.label_names is None else list(inputs.label_names),
            tokenizer=TokenizerRecord(fingerprint=inputs.tokenizer.fingerprint, file=TOKENIZER_FILE),
            written_by=_written_by(inputs, world_size),
            groups=_groups(inputs, updates),
            tied=_tied(engine.module),
            probe=probe,
        ),
        attachments={TOKENIZER_FILE: inputs.tokenizer.to_bytes()},
    )


def _groups(inputs: Inputs, updates: dict[str, int]) -> list[GroupRecord]:
    optim = inputs.config.optim
    return [
        GroupRecord(
            parameters=group.names,
            settings={
                "lr": optim.peak_lr * group.lr_scale,
                "betas": list(optim.betas),
                "eps": optim.eps,
                "weight_decay": group.weight_decay,
            },
        )
        for group in parameter_groups(inputs.shapes, inputs.trainable, optim, updates)
    ]


def _tied(module: torch.nn.Module) -> dict[str, str]:
    """Further names that the module has for parameters that it shares."""
    kept = {id(param): name for name, param in module.named_parameters()}
    everything = module.named_parameters(remove_duplicate=False)
    return {name: kept[id(param)] for name, param in everything if kept[id(param)] != name}


def _written_by(inputs: Inputs, world_size: int) -> dict[str, Any]:
    engine = inputs.config.engine
    return {
        "distft": distft.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "engine": engine.type,
        "zero_stage": getattr(engine, "zero_stage", None),
        "param_dtype": engine.param_dtype,
        "world_size": world_size,
    }
