"""Builds the device, the collectives and the engine that a configuration describes."""

import torch

from distft.checkpoint.adapters import InitialMagnitudes
from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.fragments import EMA, WEIGHT
from distft.checkpoint.sources import FirstOf, InitialSource, StateSource, WeightsOnly
from distft.collectives import Collectives, ProcessGroup, SingleProcess, all_or_none
from distft.engine.interface import Engine
from distft.engine.local import LocalEngine
from distft.engine.settings import LocalConfig
from distft.errors import ConfigError
from distft.model.initialisation import initial_fragment
from distft.optim.groups import parameter_groups
from distft.run.config import RunConfig
from distft.run.model import new_parameter_prefixes, require_parameters
from distft.run.resume import parameters_with_other_states
from distft.run.run_inputs import RunInputs
from distft.run.training_module import build_training_module
from distft.topology import BatchPlan, Topology


def choose_device(config: RunConfig, topology: Topology) -> torch.device:
    """This rank's device. Raises `ConfigError` if the configuration requires a GPU and this rank has none."""
    if config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no CUDA device here: set device=cpu or device=auto.")
    if topology.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"Local rank {topology.local_rank} has no GPU: this node has {torch.cuda.device_count()}. "
            "Start one rank for each GPU."
        )
    device = torch.device("cuda", topology.local_rank)
    torch.cuda.set_device(device)
    # The older of two settings: torch refuses to read it after the newer one, `fp32_precision`, was set.
    torch.backends.cuda.matmul.allow_tf32 = config.engine.allow_tf32
    return device


def build_collectives(config: RunConfig, topology: Topology, device: torch.device) -> Collectives:
    """The collectives of this run. ZeRO needs a process group even for a single rank."""
    if isinstance(config.engine, LocalConfig):
        return SingleProcess()
    return ProcessGroup(topology, device, config.timeout_s)


def build_engine(
    inputs: RunInputs,
    resumed: Checkpoint | None,
    plan: BatchPlan,
    collectives: Collectives,
    device: torch.device,
) -> Engine:
    """The engine with its state from `resumed`; for a new run from `init_from`, else initial weights."""
    config = inputs.config
    source = _state_source(inputs, resumed)
    with all_or_none(collectives, ConfigError):
        module = build_training_module(inputs, plan, device)
    updates = {name: source.updates(name) for name in inputs.trainable}
    widths = inputs.model.widths(inputs.shapes)
    groups = parameter_groups(inputs.shapes, inputs.trainable, config.optim, updates, widths)
    engine: Engine
    if isinstance(config.engine, LocalConfig):
        engine = LocalEngine(module, groups, settings=config.engine, optim=config.optim, device=device)
    else:
        from distft.engine.zero import ZeroEngine  # only this engine needs DeepSpeed

        engine = ZeroEngine(
            module,
            groups,
            settings=config.engine,
            optim=config.optim,
            plan=plan,
            collectives=collectives,
            device=device,
        )
    engine.load_fragments(source)
    if config.engine.param_dtype == "fp16":
        _require_range_of_fp16(engine, collectives)
    return engine


def _state_source(inputs: RunInputs, resumed: Checkpoint | None) -> StateSource:
    if resumed is not None:
        require_parameters(resumed, inputs.shapes)
        if parameters_with_other_states(resumed.manifest, inputs):
            return WeightsOnly(resumed, states=(WEIGHT, EMA))
        return resumed
    seed, model = inputs.config.seed, inputs.model
    initial = InitialSource(
        inputs.shapes,
        lambda name, shape, start, stop: initial_fragment(name, shape, start, stop, seed=seed, config=model),
    )
    sources: list[StateSource] = [initial]
    if inputs.init_from is not None:
        own = inputs.config.objective
        new = new_parameter_prefixes(inputs.init_from, inputs.heads, inputs.label_names, own)
        sources.insert(0, WeightsOnly(inputs.init_from, without=new))
    magnitudes = InitialMagnitudes(FirstOf(sources))
    return FirstOf([*sources[:-1], magnitudes, initial])


def _require_range_of_fp16(engine: Engine, collectives: Collectives) -> None:
    """Raise `ConfigError` on all ranks for weights that are infinite in fp16: every step would be skipped."""
    limit = torch.finfo(torch.float16).max
    with all_or_none(collectives, ConfigError):
        largest = {
            fragment.parameter: float(fragment.values.abs().max())
            for fragment in engine.fragments()
            if fragment.state == WEIGHT and fragment.values.numel()
        }
        problems = [f"{name} ({value:g})" for name, value in largest.items() if not value <= limit]
        if problems:
            raise ConfigError(
                f"engine.param_dtype=fp16 holds numbers up to {limit:g}, but these weights are larger: "
                f"{', '.join(problems[:5])}. Set engine.param_dtype=bf16."
            )
