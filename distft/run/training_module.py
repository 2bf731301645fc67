"""The model that a run trains, on the meta device: what is frozen, recomputed, compiled and in FP8."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import MappingProxyType

import torch

from distft.collectives import Collectives
from distft.errors import ConfigError, ErrorCollector
from distft.model.attention_kernels import require_attention_kernel
from distft.model.compiler import compile_pays, missing_for_compile
from distft.model.config import ModelConfig
from distft.model.fp8 import require_fp8, use_fp8
from distft.model.transformer_config import TransformerConfig
from distft.model.with_heads import ModelWithHeads
from distft.objective.interface import ObjectiveContext
from distft.run.model import build_module, prepare_for_engine
from distft.run.run_inputs import RunInputs
from distft.topology import BatchPlan

_log = logging.getLogger(__name__)


def build_training_module(inputs: RunInputs, plan: BatchPlan, device: torch.device) -> ModelWithHeads:
    """The model on the meta device, prepared as `engine` in the configuration says.

    Raises one `ConfigError` with all that `device` or this machine lacks for it.
    """
    settings = inputs.config.engine
    errors = ErrorCollector()
    with errors.collect():
        require_kernels(inputs.model, device)
    if settings.fp8 != "none":
        with errors.collect():
            require_fp8(settings.fp8, device)
    missing = missing_for_compile(device)
    with errors.collect():
        if settings.compile is True and missing is not None:
            raise ConfigError(f"engine.compile=true needs {missing}: install it, or set engine.compile=auto.")
    errors.raise_if_any()
    if device.type == "cuda" and (cost := cost_of_attention_dropout(inputs.model)) is not None:
        _warn(cost)
    module = build_module(inputs.model, inputs.heads, inputs.config.lora)
    for name, param in module.named_parameters():
        param.requires_grad_(name in inputs.trainable)
    prepare_for_engine(module, inputs.config)
    if settings.fp8 != "none":
        assert module.fp8_layers is not None
        emulate = device.type == "cpu"
        use_fp8(module.fp8_layers, settings.fp8, min_features=settings.fp8_min_features, emulate=emulate)
    if _uses_compile(inputs, plan, device):
        module.compile_blocks()
    return module


def require_kernels(model: ModelConfig, device: torch.device) -> None:
    """Raise `ConfigError` if `model` names a kernel that cannot run on `device`."""
    if isinstance(model, TransformerConfig):
        require_attention_kernel(model, device)


def cost_of_attention_dropout(model: ModelConfig) -> str | None:
    """What dropout in attention costs on a GPU; None if the model has none."""
    if not model.attention_dropout:
        return None
    return (
        f"model.dropout={model.attention_dropout:g} drops attention weights, too, which no fast kernel does: "
        "on a GPU each layer writes the T x T weights of every row and head, 4 bytes each. Set "
        "model.dropout=0 for speed and memory."
    )


@cache
def _warn(text: str) -> None:
    """Once in a process."""
    _log.warning(text)


def build_objective_context(
    inputs: RunInputs,
    plan: BatchPlan,
    collectives: Collectives,
    device: torch.device,
    saved_state: Mapping[str, Sequence[float]] = MappingProxyType({}),
    *,
    averaged_weights: Callable[[], AbstractContextManager[None]] | None = None,
) -> ObjectiveContext:
    """What the run's objective may use; `saved_state` is what it remembered when the run was saved.

    `averaged_weights` is the engine's.
    """
    initial = inputs.config.objective.initial_state(inputs.heads)
    state = {name: torch.tensor(saved_state.get(name, values)) for name, values in initial.items()}
    assert inputs.model.vocabulary_size is not None  # RunInputs has filled it in
    return ObjectiveContext(
        inputs.model.vocabulary_size,
        collectives,
        # On a CPU the compiled loss is no faster: 0.96 times the speed (6.9M parameters, AVX2).
        compiles=device.type == "cuda" and _uses_compile(inputs, plan, device),
        state={name: values.to(device) for name, values in state.items()},
        averaged_weights=None if inputs.config.optim.ema_decay is None else averaged_weights,
    )


def _uses_compile(inputs: RunInputs, plan: BatchPlan, device: torch.device) -> bool:
    """Whether the run compiles its model: `engine.compile`, which may leave it to the run's length."""
    setting = inputs.config.engine.compile
    if setting != "auto":
        return setting
    # Of the whole run, not of what is left of it: a resumed run must compute with the same kernels.
    return compile_pays(device, inputs.run_flops / plan.dp_world_size)
