"""Checks a run without using a device, and describes it."""

from collections.abc import Iterator
from importlib.util import find_spec
from math import prod
from typing import TYPE_CHECKING

from distft.engine.settings import LocalConfig
from distft.errors import ConfigError, ErrorCollector
from distft.run.config import RunConfig
from distft.run.paths import check_paths
from distft.topology import BatchPlan, Topology

if TYPE_CHECKING:
    from distft.run.inputs import RunInputs


def check_run(config: RunConfig, topology: Topology) -> "tuple[BatchPlan, RunInputs]":
    """The run's batch plan and inputs. Raises one error with every problem that was found."""
    check_before_torch(config, topology)
    from distft.run.inputs import read_inputs

    errors = ErrorCollector()
    with errors.collect():
        check_engine(config, topology)
    with errors.collect():
        plan = BatchPlan(dp_world_size=topology.axes.data, **config.batch.model_dump())
    with errors.collect():
        inputs = read_inputs(config)
    errors.raise_if_any()
    return plan, inputs


def check_before_torch(config: RunConfig, topology: Topology) -> None:
    """Raise for wrong paths now, before torch is imported, which takes 2 s.

    Without wrong paths it raises nothing: `check_run` finds more, and raises all of it together.
    """
    errors = ErrorCollector()
    with errors.collect():
        check_engine(config, topology)
    with errors.collect():
        BatchPlan(dp_world_size=topology.axes.data, **config.batch.model_dump())
    with errors.collect():
        check_paths(config)
        return
    errors.raise_if_any()


def check_engine(config: RunConfig, topology: Topology) -> None:
    """Raise `ConfigError` if the engine cannot run on these ranks or is not installed."""
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


def describe_run(config: RunConfig, world_size: int) -> Iterator[str]:
    """Lines that describe the run on `world_size` ranks. Raises the errors of `check_run`."""
    plan, inputs = check_run(config, Topology(world_size=world_size))
    num_steps = inputs.total_steps
    numel = {name: prod(shape) for name, shape in inputs.shapes.items()}
    num_trainable = sum(numel[name] for name in inputs.trainable)
    yield f"model       {sum(numel.values()):,} parameters, {num_trainable:,} of them trainable"
    yield f"tokenizer   {inputs.tokenizer.vocab_size:,} pieces, fingerprint {inputs.tokenizer.fingerprint}"
    for line in inputs.train.summary.splitlines():
        yield f"data        {line}"
    if inputs.validation is not None:
        for line in inputs.validation.summary.splitlines():
            yield f"validation  {line}"
    yield (
        f"batch       {plan.global_batch_size} sequences of {plan.seq_len} tokens a step; on {world_size} "
        f"rank{'s' * (world_size > 1)} {plan.gradient_accumulation_steps} micro-batches of at most "
        f"{plan.micro_batch_size}"
    )
    epochs = num_steps * plan.global_batch_size / inputs.train.num_sequences
    yield f"length      {num_steps:,} steps, {epochs:.2f} epochs, {inputs.run_flops:.2e} FLOPs"
