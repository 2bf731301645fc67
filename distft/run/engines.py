"""Devices, process groups and engines, as a configuration asks for them."""

from importlib.util import find_spec

import torch

from distft.checkpoint.sources import StateSource
from distft.collectives import Collectives, ProcessGroup, SingleProcess
from distft.engine.interface import Engine
from distft.engine.local import LocalConfig, LocalEngine
from distft.errors import ConfigError
from distft.run.config import RunConfig
from distft.run.inputs import Inputs, build_module, groups_for
from distft.topology import BatchPlan, Topology


def choose_device(config: RunConfig, topology: Topology) -> torch.device:
    """This rank's device. Raises `ConfigError` where a GPU is asked for and there is none for it."""
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
    return device


def check_engine(config: RunConfig, topology: Topology) -> None:
    """What can be said against the engine before a process group exists."""
    if isinstance(config.engine, LocalConfig) and topology.world_size > 1:
        raise ConfigError(
            f"engine.type=local is one process, but {topology.world_size} ranks were started: "
            "set engine.type=zero (zero_stage=0 for plain data parallelism), or start one."
        )
    if isinstance(config.engine, LocalConfig):
        return
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "engine.type=zero needs deepspeed, which is not installed: install it, or set engine.type=local."
        )


def join_ranks(config: RunConfig, topology: Topology, device: torch.device) -> Collectives:
    """The collectives of this run; for ZeRO a process group, even of one rank."""
    if isinstance(config.engine, LocalConfig):
        return SingleProcess()
    return ProcessGroup(topology, device, config.timeout_s)


def build_engine(
    inputs: Inputs, source: StateSource, plan: BatchPlan, collectives: Collectives, device: torch.device
) -> Engine:
    """An engine with its state loaded from `source`; each rank reads what it holds."""
    config = inputs.config
    module = build_module(
        inputs.model, inputs.head, activation_checkpointing=config.engine.activation_checkpointing
    )
    for name, param in module.named_parameters():
        param.requires_grad_(name in inputs.trainable)
    if config.engine.compile:
        module.compile_blocks()
    groups = groups_for(inputs, source)
    engine: Engine
    if isinstance(config.engine, LocalConfig):
        engine = LocalEngine(module, groups, settings=config.engine, optim=config.optim, device=device)
    else:
        from distft.engine.zero import ZeroEngine  # DeepSpeed is needed by nothing else

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
    return engine
